"""The comparison of methods: what it does to images, and how it scores them."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from monai.metrics import compute_dice
from monai.networks.utils import one_hot


@pytest.fixture
def compare(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "results"))
    return importlib.import_module("compare")


@pytest.fixture
def item() -> dict[str, Any]:
    """An image of a box with two labels off its center, for both sides."""
    image, labels = torch.zeros(1, 16, 12, 8), torch.zeros(1, 16, 12, 8)
    image[:, 2:14, 1:11, 1:7] = 0.1 + torch.rand(1, 12, 10, 6, generator=torch.Generator().manual_seed(0))
    labels[:, 4:8, 3:6, 2:5], labels[:, 8:10, 3:6, 2:5] = 1, 2
    return {"moving": image, "fixed": image, "moving_label": labels, "fixed_label": labels}


def test_overlap_is_monais(compare: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    moved, fixed = (torch.randint(0, 5, (1, 1, 9, 8, 7), generator=generator) for _ in range(2))
    expected = compute_dice(one_hot(moved, 5), one_hot(fixed, 5), include_background=False)[0]
    found = compare.label_dice(moved.float(), fixed.float(), [1, 2, 4])
    assert found == pytest.approx({label: expected[label - 1].item() for label in (1, 2, 4)})


def test_a_quarter_turn_moves_voxels_and_the_fixed_image_stays(compare: ModuleType, item: dict[str, Any]) -> None:
    turned = compare.turned(item, 90)
    size = turned["moving"].shape[1]
    assert turned["moving"].shape == turned["fixed"].shape == (1, size, size, 8) and size >= (16**2 + 12**2) ** 0.5
    still, label = compare.turned(item, 360), turned["moving_label"].as_subclass(torch.Tensor)
    quarters = [torch.rot90(still["moving_label"].as_subclass(torch.Tensor), k, [1, 2]) for k in (1, -1)]
    assert sum(torch.equal(label, quarter) for quarter in quarters) == 1
    assert torch.equal(turned["fixed"].as_subclass(torch.Tensor), still["fixed"].as_subclass(torch.Tensor))
    assert compare.turned(item, 0) == item


@pytest.mark.parametrize("side", ["moving", "fixed"])
def test_a_cropped_image_keeps_its_labels(compare: ModuleType, item: dict[str, Any], side: str) -> None:
    item["moving_label"][:, 4, 3, 0] = 1  # a label may lie outside the content
    kept = set()
    for seed in range(8):
        out = compare.cropped(item, 0.7, side, seed)
        other = "fixed" if side == "moving" else "moving"
        assert out[other] is item[other]
        inside = (item[side] != 0) & (item[f"{side}_label"] != 0)
        assert torch.equal(out[side][inside], item[side][inside])
        assert compare.whole([1, 2], item, out, side) == [1, 2]
        lengths = (torch.nonzero(out[side][0]).amax(dim=0) - torch.nonzero(out[side][0]).amin(dim=0) + 1).tolist()
        assert lengths[:2] == [round(0.7 * 12), round(0.7 * 10)]
        kept.add(tuple(torch.nonzero(out[side][0])[0].tolist()))
    assert len(kept) > 1


def test_labels_that_a_crop_cuts_are_not_scored(compare: ModuleType, item: dict[str, Any]) -> None:
    scored = set()
    for seed in range(20):
        out = compare.cropped(item, 0.5, "fixed", seed, keep=False)
        lengths = torch.nonzero(out["fixed"][0]).amax(dim=0) - torch.nonzero(out["fixed"][0]).amin(dim=0) + 1
        assert lengths.tolist() == [6, 5, 3]
        outside = out["fixed"] == 0
        assert not out["fixed_label"][outside].any()
        lost = [label for label in (1, 2) if (item["fixed_label"][outside] == label).any()]
        if len(lost) == 2:
            with pytest.raises(ValueError, match="expected a crop that leaves a label whole, got one that cuts all 2"):
                compare.whole([1, 2], item, out, "fixed")
            continue
        found = compare.whole([1, 2], item, out, "fixed")
        assert found == [label for label in (1, 2) if label not in lost]
        scored.add(tuple(found))
    assert len(scored) > 1


@pytest.mark.parametrize(
    ("method", "package"), [("elastix", "itk-elastix"), ("convexadam", "convexadam"), ("ants", "antspyx")]
)
def test_fields_of_other_tools_have_our_sign_and_axes(compare: ModuleType, method: str, package: str) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"needs {package}")
    generator = torch.Generator().manual_seed(0)
    blobs = torch.zeros(1, 1, 36, 40, 32)
    blobs[..., 10:26, 12:28, 8:24] = 0.2 + torch.rand(4, 4, 4, generator=generator).repeat_interleave(
        4, dim=0
    ).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    moving, shift = blobs.roll((3, -2, 1), dims=(2, 3, 4)), torch.tensor([3.0, -2.0, 1.0])
    ddf = compare.registration(method, "", 1)(moving, blobs)()
    assert ddf.shape == (1, 3, 36, 40, 32)
    assert (ddf[0, :, 12:24, 14:26, 10:22].flatten(1).median(dim=1).values - shift).abs().max() < 0.5


def test_unknown_words_are_told(compare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data of hippocampus, brain, got 'heart'"):
        compare.main("heart", str(tmp_path))
    with pytest.raises(ValueError, match="crop_side is moving or fixed, got 'both'"):
        compare.main("brain", str(tmp_path), crop_side="both")
