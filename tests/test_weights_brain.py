"""The weights `brain` on real brains that no training has seen, turned far from each other."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import equireg
from equireg.fields import warp
from equireg.inferer import RegistrationInferer
from equireg.metrics import folding_fraction
from equireg.networks import PairNetwork


def test_brains_turned_far_apart_are_brought_together(
    root: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data / "brain_malf_2mm"
    if not folder.exists():
        pytest.skip("the folder brain_malf_2mm is not there")
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "results"))
    compare = importlib.import_module("compare")
    data = compare.DATA["brain"]
    item = compare.turned(compare.pairs(data, folder, "validation", 1)[0], 150)
    images = {key: torch.as_tensor(np.asarray(item[key]))[None].float() for key in compare.PAIR_KEYS}
    labels = compare.common_labels(data, folder)

    def overlap(moved: torch.Tensor) -> float:
        dice = compare.label_dice(moved, images["fixed_label"], labels)
        return sum(dice.values()) / len(dice)

    network = PairNetwork(equireg.load_network("brain")).eval()
    with torch.no_grad():
        ddf = RegistrationInferer()(images["moving"], network, fixed=images["fixed"])[:, :3]
    assert overlap(images["moving_label"]) < 0.05
    assert overlap(warp(images["moving_label"], ddf, mode="nearest", padding="zeros")) > 0.4
    assert folding_fraction(ddf).item() < 0.001


def test_a_part_of_a_brain_is_found_in_another(root: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the volume, at an unknown place: labels that it holds wholly overlap as whole brains' do."""
    folder = shared_data / "brain_malf_2mm"
    if not folder.exists():
        pytest.skip("the folder brain_malf_2mm is not there")
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "results"))
    compare = importlib.import_module("compare")
    data, number = compare.DATA["brain"], 5
    item = compare.pairs(data, folder, "validation", 12)[number]
    part = compare.cropped(item, 0.7, "moving", number, keep=False)
    labels = compare.whole(compare.common_labels(data, folder), item, part, "moving")
    images = compare.shifted(part, 0)
    assert np.count_nonzero(images["moving"]) < 0.7 * np.count_nonzero(item["moving"])

    def overlap(moved: torch.Tensor) -> float:
        return float(np.mean(list(compare.label_dice(moved, images["fixed_label"], labels).values())))

    network = PairNetwork(equireg.load_network("brain")).eval()
    with torch.no_grad():
        ddf = RegistrationInferer()(images["moving"], network, fixed=images["fixed"])[:, :3]
    assert overlap(images["moving_label"]) < 0.5 < 0.55 < overlap(warp(images["moving_label"], ddf, mode="nearest"))
    assert folding_fraction(ddf).item() < 0.001
