"""Curves of error and overlap: flat where a network follows its images, and measured on images it should follow."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers_networks import SMALL, blocks, place, randomized, sharpened

from equireg.curves import curve_figure, equivariance_curve, held_out_pairs, measure, summarize
from equireg.equivariance import Cropped
from equireg.fields import identity_grid
from equireg.moves import rotation, translation, turn_angle
from equireg.networks import CARL, DisplacementUNet


def pairs(dims: int = 2, count: int = 2) -> list[dict[str, torch.Tensor]]:
    size, canvas, at = [(9, 8, 7)[:dims], (14, 15, 13)[:dims], (2, 4, 3)[:dims]]
    return [
        {
            "moving": place(blocks(*size, seed=2 * k), canvas, at)[0],
            "fixed": place(blocks(*size, seed=2 * k + 1), canvas, at)[0],
        }
        for k in range(count)
    ]


def network(dims: int = 2, **options) -> CARL:
    return randomized(CARL(dims, **SMALL, **options))


@pytest.mark.parametrize("dims", [2, 3])
def test_whole_voxel_shifts_are_flat(dims: int) -> None:
    rows = equivariance_curve(network(dims), pairs(dims), [0, 1, 2, 5], "shift", "moving")
    rows += equivariance_curve(Cropped(network(dims)), pairs(dims), [0, 3], "shift", "fixed")
    assert len(rows) == 12 and max(row["error_max"] for row in rows) < 1e-3
    for index in (0, 1):
        scores = [row["dice"] for row in rows[:8] if row["pair"] == index]
        assert max(scores) - min(scores) < 0.02


def test_quarter_turns_are_flat_for_a_group_and_other_angles_are_not() -> None:
    images = [pairs()[0][name].unsqueeze(0) for name in ("moving", "fixed")]
    stage = sharpened(network(rotation_group="grid").attention_stage(), *images)
    for side in ("moving", "fixed", "both"):
        rows = equivariance_curve(stage, pairs(), [0, 90, 180, 270, 30], "angle", side)
        errors = {row["amount"]: row["error_max"] for row in rows}
        assert max(errors[angle] for angle in (0, 90, 180, 270)) < 1e-3 and errors[30] > 0.05
    plain = equivariance_curve(network().attention_stage(), pairs(), [90], "angle", "moving")
    assert plain[0]["error_mean"] > 0.5


def test_a_displacement_network_does_not_follow() -> None:
    rows = equivariance_curve(randomized(DisplacementUNet(2, channels=(4, 8))), pairs(), [0, 4], "shift", "moving")
    assert rows[0]["error_max"] < 1e-4 and rows[1]["error_mean"] > 1.0


def test_labels_are_scored_where_there_are_any() -> None:
    [pair] = pairs(count=1)
    for name in ("moving", "fixed"):
        pair[f"{name}_label"] = (pair[name] > 0.6).to(torch.uint8) + (pair[name] > 0).to(torch.uint8)
    same = {**pair, "fixed": pair["moving"], "fixed_label": pair["moving_label"]}

    def zero(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 2, *fixed.shape[2:])

    rows = equivariance_curve(zero, [same], [0, 90], "angle", "both")
    assert [row["dice"] for row in rows] == [1.0, 1.0], "images and labels turn together"
    assert equivariance_curve(zero, [same], [90], "angle", "moving")[0]["dice"] < 0.9


@pytest.mark.parametrize("side", ["moving", "fixed"])
@pytest.mark.parametrize(("kind", "amount"), [("shift", 2.5), ("angle", 30)])
def test_overlap_is_full_for_a_network_that_knows_the_answer(kind: str, amount: float, side: str) -> None:
    """Also between voxels: labels are never moved, only looked up where the answer says."""
    [pair] = pairs(count=1)
    label = (pair["moving"] > 0.3).to(torch.uint8)
    same = {"moving": pair["moving"], "fixed": pair["moving"], "moving_label": label, "fixed_label": label}
    asked: list[tuple[int, ...]] = []

    def oracle(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(fixed.shape[2:]))
        shape = list(fixed.shape[2:])
        move = translation([amount, 0], shape) if kind == "shift" else rotation(turn_angle(amount, 2), shape, shape)
        grid = identity_grid(shape, torch.float64)
        there = move.to_new(grid) if side == "moving" else move.to_old(grid)
        return (there - grid) * (len(asked) > 1)  # the first question is about the images as they are

    [row] = equivariance_curve(oracle, [same], [amount], kind, side)
    assert len(asked) == 2 and row["dice"] > 0.99 and row["error_max"] < 1e-6


@pytest.mark.parametrize(("kind", "side"), [("scale", "moving"), ("shift", "left")])
def test_unknown_kinds_and_sides_are_refused(kind: str, side: str) -> None:
    with pytest.raises(ValueError, match="kind must be shift or angle and side moving, fixed or both"):
        equivariance_curve(network(), pairs(), [0], kind, side)


def test_summary_joins_pairs() -> None:
    rows = equivariance_curve(network(), pairs(), [0, 2], "shift", "moving")
    first, second = summarize(rows)
    assert (first["amount"], second["amount"], first["pairs"]) == (0, 2, 2)
    assert first["dice"] == pytest.approx((rows[0]["dice"] + rows[2]["dice"]) / 2)
    assert second["error_max"] == max(rows[1]["error_max"], rows[3]["error_max"])
    assert first["dice_sd"] == pytest.approx(abs(rows[0]["dice"] - rows[2]["dice"]) / 2**0.5)


@pytest.mark.parametrize("crop", [False, True])
def test_measure_writes_a_table_and_a_picture(crop: bool, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    summary = measure("vessels", "", tmp_path, pairs=1, shifts=(0, 3), angles=(0, 90), crop=crop)
    assert [(r["kind"], r["side"], r["amount"]) for r in summary][:3] == [
        ("shift", "moving", 0),
        ("shift", "moving", 3),
        ("shift", "fixed", 0),
    ]
    assert summary[1]["error_max"] < 1e-3 and summary[1]["dice"] > 0.6
    assert (summary[3]["error_max"] < 1e-3) == crop
    with open(tmp_path / "equivariance.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(summary) == 8
    assert (tmp_path / "equivariance.png").read_bytes()[:4] == b"\x89PNG"
    assert "3 voxels" in capsys.readouterr().out


def test_only_shifts() -> None:
    summary = measure("vessels", pairs=1, shifts=(0,), angles=(), sides=("moving",))
    assert [row["kind"] for row in summary] == ["shift"]


def test_pairs_without_data() -> None:
    [flat], [deep] = held_out_pairs(2, count=1), held_out_pairs(3, count=1)
    assert sorted(flat) == ["fixed", "moving"] and flat["moving"].max() == 1
    assert sorted(deep) == ["fixed", "fixed_label", "moving", "moving_label"] and deep["moving"].ndim == 4
    assert type(deep["moving"]) is torch.Tensor


def test_pairs_of_real_images(shared_data: Path) -> None:
    eyes = held_out_pairs(2, shared_data, count=2)
    assert [pair["moving"].shape for pair in eyes] == [(1, 112, 112)] * 2
    assert not torch.equal(eyes[0]["moving"], eyes[0]["fixed"]) and eyes[0]["fixed"].min() == 0
    [crop] = held_out_pairs(3, shared_data / "Task04_Hippocampus", count=1)
    assert crop["moving"].ndim == 4 and set(crop["moving_label"].unique().tolist()) <= {0, 1, 2}
    with pytest.raises(ValueError, match="found no file"):
        held_out_pairs(2, shared_data / "Task04_Hippocampus" / "imagesTr")


def test_figure_of_one_kind_has_one_column() -> None:
    pytest.importorskip("matplotlib")
    rows = equivariance_curve(network(), pairs(count=1), [0, 2], "shift", "moving")
    figure = curve_figure({"ours": rows, "again": rows}, "title")
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["ours, moving", "again, moving"]
