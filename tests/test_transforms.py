"""Transforms of pairs: values, metadata, untouched inputs and messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose

from equireg.fields import warp
from equireg.transforms import (
    NormalizeContent,
    NormalizeContentd,
    RandShiftd,
    RandWarpPaird,
    SplitPred,
    SplitPredd,
    StackPair,
    StackPaird,
    WarpLabel,
    WarpLabeld,
)


def affine(scale: float) -> torch.Tensor:
    return torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))


def content_image(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """An image `(1, 7, 9)` of 7 x 9 voxels, all content, of random order of magnitude `scale`."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(1, 2, (1, 7, 9))) * scale


def test_normalize_matches_percentiles_of_the_content_alone() -> None:
    image = torch.zeros(1, 20, 20, dtype=torch.float64)
    image[:, 5:12, 4:13] = content_image(scale=300.0)
    content = image[image != 0].numpy()
    low, high = np.percentile(content, [2, 90])
    result = NormalizeContent(2, 90)(image)
    expected = np.clip((image.numpy() - low) / (high - low), 1e-3, 1) * (image.numpy() != 0)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert torch.equal(result != 0, image != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_normalize_is_bit_identical_on_another_canvas(dtype: torch.dtype) -> None:
    content = content_image(1, 1e6).to(dtype)
    small = NormalizeContent()(content)
    for offset, shape in [((0, 0), (7, 30)), ((11, 3), (40, 13))]:
        canvas = torch.zeros(1, *shape, dtype=dtype)
        window = (slice(None), slice(offset[0], offset[0] + 7), slice(offset[1], offset[1] + 9))
        canvas[window] = content
        result = NormalizeContent()(canvas)
        assert torch.equal(result[window], small)
        assert result.count_nonzero() == small.count_nonzero() == 63


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1.0e12])
def test_normalize_does_not_depend_on_the_unit(scale: float) -> None:
    image = content_image()
    torch.testing.assert_close(NormalizeContent()(image * scale), NormalizeContent()(image), atol=1e-6, rtol=0)
    negative = NormalizeContent()(-image * scale)
    assert negative.min() == pytest.approx(1e-3) and negative.max() == 1


def test_normalize_survives_the_full_range_of_floats_and_numpy_integers() -> None:
    extreme = NormalizeContent(upper=100)(np.array([[-1.7e308, 0.0, 1.7e308]]))
    assert extreme.tolist() == [[pytest.approx(1e-3), 0.0, 1.0]]
    for kind in (np.uint8, np.uint16, np.int16, np.int64):
        result = NormalizeContent(upper=100)(np.array([[0, 50, 100, 150]], dtype=kind))
        torch.testing.assert_close(result, torch.tensor([[0, 1e-3, 0.5, 1.0]]))


def test_normalize_takes_content_from_any_channel_and_scales_channels_apart() -> None:
    image = torch.tensor([[0.0, 0.0, 5.0, 10.0], [0.0, 1.0, 0.0, 4.0]])
    result = NormalizeContent(upper=100)(image)
    torch.testing.assert_close(result, torch.tensor([[0.0, 1e-3, 0.5, 1.0], [0.0, 0.25, 1e-3, 1.0]]))
    ct = NormalizeContent(upper=100, background=-1024)(torch.tensor([[-1024.0, 0.0, 500.0, -500.0]]))
    torch.testing.assert_close(ct, torch.tensor([[0.0, 0.5, 1.0, 1e-3]]))


def test_normalize_of_masks_and_bad_input() -> None:
    mask = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert NormalizeContent(constant="one")(mask).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="constant channel in an image of shape \\[1, 4\\]"):
        NormalizeContent()(mask)
    # Coinciding percentiles of content that does vary are replaced by its range.
    mostly = torch.ones(1, 1000)
    mostly[0, 0] = 3
    assert NormalizeContent()(mostly).unique().tolist() == pytest.approx([1e-3, 1.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite values"):
            NormalizeContent()(torch.tensor([[1.0, bad]]))
    named = MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": "empty.nii.gz"})
    with pytest.raises(ValueError, match="nothing but background 0.0 in 'empty.nii.gz'"):
        NormalizeContent()(named)
    with pytest.raises(ValueError, match="0 <= lower < upper <= 100, got 50 and 10"):
        NormalizeContent(50, 10)
    with pytest.raises(ValueError, match="'error' or 'one', got 'skip'"):
        NormalizeContent(constant="skip")


def test_normalize_keeps_metadata_and_its_input() -> None:
    image = MetaTensor(content_image(), affine=affine(2.0), meta={"filename_or_obj": "a.nii"})
    before = image.clone()
    item = {"moving": image, "other": 1}
    result = NormalizeContentd("moving")(item)
    assert isinstance(result["moving"], MetaTensor) and torch.equal(result["moving"].affine, affine(2.0))
    assert item["moving"] is image and torch.equal(image, before)
    assert NormalizeContentd(["moving", "absent"], allow_missing_keys=True)(item).keys() == item.keys()
    with pytest.raises(KeyError):
        NormalizeContentd("absent")(item)


def test_stack_pair_carries_the_metadata_of_the_fixed_image() -> None:
    moving = MetaTensor(torch.ones(2, 4, 5, 6), affine=affine(1.0), meta={"filename_or_obj": "moving.nii"})
    fixed = MetaTensor(torch.zeros(2, 4, 5, 6), affine=affine(3.0), meta={"filename_or_obj": "fixed.nii"})
    item = StackPaird()({"moving": moving, "fixed": fixed})
    pair = item["image"]
    assert pair.shape == (4, 4, 5, 6) and pair[:2].min() == 1 and pair[2:].max() == 0
    assert torch.equal(pair.affine, affine(3.0)) and pair.meta["filename_or_obj"] == "fixed.nii"
    assert item["label"] is pair
    pair.affine = affine(9.0)
    assert torch.equal(fixed.affine, affine(3.0)) and torch.equal(moving.affine, affine(1.0))
    assert set(StackPaird(image_key="pair", label_key=None)(item)) - set(item) == {"pair"}
    assert not isinstance(StackPair()(torch.ones(1, 2, 2), np.zeros((1, 2, 2), np.float32)), MetaTensor)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 5)])
def test_stack_pair_refuses_differing_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="moving \\[1, 4, 5\\] and fixed \\[" + ", ".join(map(str, shape))):
        StackPair()(torch.zeros(1, 4, 5), torch.zeros(shape))


def test_split_pred_with_and_without_batch() -> None:
    pred = torch.arange(5 * 2 * 2 * 2.0).reshape(5, 2, 2, 2)
    ddf, moved = SplitPred()(pred)
    assert torch.equal(ddf, pred[:3]) and torch.equal(moved, pred[3:])
    ddf, moved = SplitPred(spatial_dims=3)(pred[None])
    assert torch.equal(ddf, pred[None, :3]) and torch.equal(moved, pred[None, 3:])
    item = SplitPredd(ddf_key="u", moved_key="m")({"pred": MetaTensor(pred, affine=affine(2.0))})
    assert torch.equal(item["u"].affine, affine(2.0)) and torch.equal(item["m"], pred[3:])
    for bad in (torch.zeros(2, 4, 4), torch.zeros(1, 1, 5, 4, 4, 4)):
        with pytest.raises(ValueError, match="SplitPred expects"):
            SplitPred(spatial_dims=None if bad.dim() == 3 else 3)(bad)


def test_warp_label_moves_by_the_ddf_and_keeps_type() -> None:
    label = torch.randint(0, 5, (1, 6, 7, 5), dtype=torch.uint8)
    pred = torch.zeros(4, 6, 7, 5)
    pred[0], pred[2], pred[3] = 2.0, -1.0, 77.0  # the fourth channel is the moved image
    moved = WarpLabel()(label, pred)
    expected = torch.zeros_like(label)
    expected[:, :4, :, 1:] = label[:, 2:, :, :-1]
    assert moved.dtype == torch.uint8 and torch.equal(moved, expected)
    half = WarpLabel("linear", "border")(label.float(), torch.full((3, 6, 7, 5), 0.5).half())
    assert half.dtype == torch.float32 and half[0, -1, -1, -1] == label[0, -1, -1, -1]
    with pytest.raises(ValueError, match="WarpLabel expects"):
        WarpLabel()(label, torch.zeros(2, 6, 7, 5))


def test_warp_labeld_takes_the_metadata_of_the_fixed_image_or_else_of_the_ddf() -> None:
    label = MetaTensor(torch.ones(1, 4, 4, 4), affine=affine(1.0))
    pred = MetaTensor(torch.zeros(4, 5, 5, 5), affine=affine(2.0))
    fixed = MetaTensor(torch.zeros(1, 5, 5, 5), affine=affine(3.0))
    item = {"moving_label": label, "pred": pred, "fixed": fixed}
    moved = WarpLabeld()(item)["moved_label"]
    assert moved.shape == (1, 5, 5, 5) and torch.equal(moved.affine, affine(3.0))
    assert torch.equal(WarpLabeld(meta_key=None)(item)["moved_label"].affine, affine(2.0))
    two = WarpLabeld(keys=["moving_label", "absent"], output=["a", "b"], allow_missing_keys=True)(item)
    assert "a" in two and "b" not in two
    with pytest.raises(ValueError, match="one output name per key"):
        WarpLabeld(keys=["a", "b"], output=["c", "c"])


def test_transforms_work_on_decollated_batches() -> None:
    items = [{"moving": content_image(i).float(), "fixed": content_image(i + 9).float()} for i in range(2)]
    for item in items:
        item["moving_label"] = (item["moving"] > 1.5).to(torch.uint8)
    batch = list_data_collate([StackPaird()(item) for item in items])
    batch["pred"] = torch.cat([torch.zeros(2, 2, 7, 9), batch["image"][:, :1]], dim=1)
    for item, out in zip(items, decollate_batch(batch)):
        out = Compose([WarpLabeld(), SplitPredd()])(out)
        assert torch.equal(out["moved_label"], item["moving_label"])
        assert torch.equal(out["moved"], item["moving"]) and out["ddf"].shape == (2, 7, 9)


def single_voxels(keys: list[str], size: int = 21) -> dict[str, torch.Tensor]:
    image = torch.zeros(1, size, size)
    image[0, size // 2, size // 2] = 1
    return {key: image.clone() for key in keys}


def test_rand_shift_moves_groups_together_and_apart_from_each_other() -> None:
    keys = ["moving", "moving_label", "fixed", "fixed_label"]
    transform = RandShiftd([("moving", "moving_label"), ("fixed", "fixed_label")], max_shift=(4, 0))
    transform.set_random_state(0)
    seen = set()
    for _ in range(60):
        item = single_voxels(keys)
        out = transform(item)
        at = {key: tuple((out[key][0].nonzero()[0] - 10).tolist()) for key in keys}
        assert at["moving"] == at["moving_label"] and at["fixed"] == at["fixed_label"]
        assert abs(at["moving"][0]) <= 4 and at["moving"][1] == 0
        assert item["moving"][0, 10, 10] == 1  # the input stays as it was
        seen.add((at["moving"][0], at["fixed"][0]))
    assert {m for m, _ in seen} == set(range(-4, 5)) == {f for _, f in seen}
    assert len(seen) > 30  # independent: far more combinations than one shift for both would give


def test_rand_shift_loses_what_leaves_keeps_metadata_and_respects_prob() -> None:
    image = MetaTensor(torch.ones(1, 4, 4, 4), affine=affine(2.0))
    moved = RandShiftd(["image"], max_shift=3).set_random_state(1)({"image": image})["image"]
    assert 0 < moved.sum() < 64 and torch.equal(moved.affine, affine(2.0))
    assert RandShiftd(["image"], max_shift=3, prob=0.0)({"image": image})["image"] is image
    same = [RandShiftd(["image"], 3).set_random_state(5)({"image": image})["image"] for _ in range(2)]
    assert torch.equal(*same)
    partial = RandShiftd([("image", "label")], 1, allow_missing_keys=True)({"image": image})
    assert set(partial) == {"image"}
    with pytest.raises(KeyError):
        RandShiftd([("image", "label")], 1)({"image": image})
    with pytest.raises(ValueError, match="max_shift expects one number or 3"):
        RandShiftd(["image"], (1, 2))({"image": image})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        RandShiftd(["image"], -1)


def test_rand_warp_pair_of_a_pure_shift_is_exact() -> None:
    image = torch.zeros(1, 30, 26)
    image[:, 10:17, 8:15] = torch.rand(1, 7, 7)
    item = RandWarpPaird(sigma=[0.0], points=[3], shift=(4, -5))({"image": image})
    assert torch.equal(item["moving"], image)
    torch.testing.assert_close(item["fixed"], torch.roll(image, (4, -5), (1, 2)), atol=1e-5, rtol=0)
    assert item["true_ddf"].flatten(1).unique(dim=1).flatten().tolist() == [-4.0, 5.0]


def test_rand_warp_pair_truth_reproduces_the_fixed_image() -> None:
    image = torch.zeros(2, 48, 40)
    image[:, 12:36, 12:28] = torch.rand(2, 24, 16)
    transform = RandWarpPaird(shift=3.0).set_random_state(2)
    first, second = transform({"image": image}), transform({"image": image})
    for item in (first, second):
        moved = warp(item["moving"][None], item["true_ddf"][None], padding="zeros")[0]
        assert torch.equal(moved, item["fixed"])
        assert torch.equal(item["moving"], image) and item["true_ddf"].shape == (2, 48, 40)
    assert not torch.equal(first["true_ddf"], second["true_ddf"])
    again = RandWarpPaird(shift=3.0).set_random_state(2)({"image": image})
    assert torch.equal(again["fixed"], first["fixed"])
    still = RandWarpPaird(sigma=[0.0], points=[3], shift=3.0).set_random_state(2)({"image": image})
    torch.testing.assert_close(still["true_ddf"].norm(dim=0), torch.full((48, 40), 3.0))


def test_rand_warp_pair_scales_with_the_image_and_says_what_it_expects() -> None:
    small, large = (
        RandWarpPaird([0.05], [3]).set_random_state(7)({"image": torch.rand(1, n, n)})["true_ddf"] for n in (21, 41)
    )
    torch.testing.assert_close(large[:, ::2, ::2] / 41, small / 21, atol=1e-5, rtol=0)
    volume = RandWarpPaird()({"image": MetaTensor(torch.rand(1, 9, 8, 7), affine=affine(2.0))})
    assert volume["true_ddf"].shape == (3, 9, 8, 7) and torch.equal(volume["fixed"].affine, affine(2.0))
    with pytest.raises(ValueError, match="one sigma per number of points"):
        RandWarpPaird([0.1], [3, 6])
    with pytest.raises(ValueError, match="shift expects one number or 2"):
        RandWarpPaird(shift=(1, 2, 3))({"image": torch.rand(1, 8, 8)})


def test_transforms_are_built_by_configs() -> None:
    config = {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "equireg.transforms.NormalizeContentd", "keys": ["moving", "fixed"]},
            {
                "_target_": "equireg.transforms.RandShiftd",
                "keys": [["moving", "moving_label"], ["fixed", "fixed_label"]],
                "max_shift": 2,
                "prob": 0.5,
                "allow_missing_keys": True,
            },
            {"_target_": "equireg.transforms.StackPaird"},
        ],
    }
    parser = ConfigParser({"preprocessing": config})
    item = parser.get_parsed_content("preprocessing")({"moving": content_image(), "fixed": content_image(1)})
    assert item["image"].shape == (2, 7, 9) and item["image"].dtype == torch.float32
