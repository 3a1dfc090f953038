"""Random transforms of pairs: what moves together, known answers, repeatability and messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from equireg.augmentation import RandDeformd, RandPaintPaird, RandShiftd, RandWarpPaird
from equireg.fields import warp


def affine(scale: float) -> torch.Tensor:
    return torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))


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


# ---- images from label maps


def halves(size: int = 24) -> MetaTensor:
    """Two labels side by side in a box, a third in its middle."""
    labels = torch.zeros(1, size, size, size)
    labels[:, 4:12, 4:20, 4:20], labels[:, 12:20, 4:20, 4:20], labels[:, 10:14, 9:15, 9:15] = 1, 2, 3
    return MetaTensor(labels, affine=affine(2.0))


def test_rand_deform_keeps_labels_whole_and_deforms_each_key_on_its_own() -> None:
    item = {"moving": halves(), "fixed": halves()}
    out = RandDeformd(["moving", "fixed"]).set_random_state(0)(item)
    for key in ("moving", "fixed"):
        assert out[key].unique().tolist() == [0, 1, 2, 3] and torch.equal(out[key].affine, affine(2.0))
        changed = float((out[key] != item[key]).float().mean())
        assert 0.02 < changed < 0.5
    assert not torch.equal(out["moving"], out["fixed"])
    again = RandDeformd(["moving", "fixed"]).set_random_state(0)(item)
    assert torch.equal(again["moving"], out["moving"])
    still = RandDeformd(["moving"], turn=0.0, scale=0.0, sigma=(), points=())(item)
    assert torch.equal(still["moving"], item["moving"])
    with pytest.raises(ValueError, match="one sigma per number of points"):
        RandDeformd(["moving"], sigma=(0.1,), points=(3, 4))


def test_rand_deform_turns_and_scales_about_the_center() -> None:
    transform, size = RandDeformd(["moving"], sigma=(), points=()).set_random_state(3), 25
    ddf = transform._draw((size, size, size))
    assert ddf[0, :, 12, 12, 12].abs().max() < 1e-5
    torch.testing.assert_close(ddf[0, :, 20, 3, 8], -ddf[0, :, 4, 21, 16], atol=1e-5, rtol=0)
    turned = RandDeformd(["moving"], scale=0.0, sigma=(), points=()).set_random_state(3)._draw((size, size, size))
    spoke, moved = torch.tensor([8.0, -9.0, -4.0]), turned[0, :, 20, 3, 8]
    assert abs((spoke + moved).norm() - spoke.norm()) < 1e-4 and moved.norm() > 1  # as long as before: a turn


def test_painted_pairs_share_what_is_compared() -> None:
    item = {"moving": halves(), "fixed": torch.flip(halves(), [1])}
    paint_pair = RandPaintPaird(groups=[1, 1, 2], masks=2, labels=3, same_contrast=0.0).set_random_state(0)
    out = paint_pair(item)
    levels: dict[str, np.ndarray] = {}
    for key in ("moving", "fixed"):
        image, carried, labels = out[key], out[f"{key}_carried"], item[key]
        assert image.shape == (1, 24, 24, 24) and carried.shape == (3, 24, 24, 24)
        assert torch.equal(image != 0, labels != 0) and torch.equal(image.affine, affine(2.0))
        one, two, three = (carried[0][labels[0] == label].unique() for label in (1, 2, 3))
        assert len(one) == len(two) == len(three) == 1 and one == two != three  # groups look alike
        levels[key] = np.array([image[labels == 1].mean(), image[labels == 3].mean()])
    assert out["moving_carried"][0].unique().tolist() == out["fixed_carried"][0].unique().tolist()
    drawn = [
        {int(item[key][0][mask > 0].unique()) for mask in out[f"{key}_carried"][1:]} for key in ("moving", "fixed")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    assert np.abs(levels["moving"] - levels["fixed"]).max() > 0.1  # contrasts of their own


def test_painted_pairs_may_share_their_contrast() -> None:
    for seed in range(5):
        item = {"moving": halves(), "fixed": halves()}
        out = RandPaintPaird(groups=[1, 2, 3], labels=3, masks=0, same_contrast=1.0).set_random_state(seed)(item)
        means = [[float(out[key][item[key] == label].mean()) for label in (1, 2, 3)] for key in ("moving", "fixed")]
        assert np.abs(np.subtract(*means)).max() < 0.1
        assert not torch.equal(out["moving"], out["fixed"])  # noise of their own
    with pytest.raises(ValueError, match="got 4, 3 and 3 groups"):
        RandPaintPaird(groups=[1, 2, 3], masks=4, labels=3)


def test_rand_deform_says_which_point_each_voxel_shows() -> None:
    """A map whose every voxel has its own label: where a voxel's label lies in it is what its coordinates say."""
    size, keys = 9, ["moving", "fixed"]
    item = {"moving": torch.arange(1.0, 1 + size**3).reshape(1, size, size, size), "fixed": torch.ones(1, 9, 9, 9)}
    where = {"same": 1.0, "coordinates_keys": ["moving_at", "fixed_at"]}
    out = RandDeformd(keys, **where).set_random_state(0)(item)
    assert not torch.equal(out["moving"], out["fixed"])
    for key in keys:
        place, known = out[f"{key}_at"][:3], out[f"{key}_at"][3]
        assert torch.equal(known, (out[key][0] > 0).float()) and 0 < known.mean() <= 1
        seen = torch.stack(torch.unravel_index(out[key][0].long() - 1, (size,) * 3)).float() - (size - 1) / 2
        assert ((seen - place).abs().amax(0) <= 0.5001)[known > 0].all()  # the nearest voxel was taken
    assert item["fixed"].max() == 1
    different = RandDeformd(keys, **{**where, "same": 0.0}).set_random_state(0)(item)
    assert different["moving_at"][3].max() == 0 == different["fixed_at"][3].max() and different["fixed"].max() == 1
    alone = RandDeformd(keys, **where, allow_missing_keys=True)({"fixed": item["fixed"]})
    assert set(alone) == {"fixed", "fixed_at"}
    with pytest.raises(ValueError, match="one of coordinates_keys per key"):
        RandDeformd(keys, coordinates_keys=["moving_at"])
