"""Synthetic anatomy: what it promises about background, bounds, smoothness and reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equireg import synthesis
from equireg.fields import jacobian_determinant


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("size", "points"), [(17, 5), (9, 3), (31, 2), (13, 4)])
def test_smooth_noise_passes_through_its_control_points(size: int, points: int) -> None:
    control = torch.from_numpy(rng(3).standard_normal((2, points), dtype=np.float32))
    field = synthesis.smooth_noise(2, (size,), points, rng(3))
    step = (size - 1) // (points - 1)
    torch.testing.assert_close(field[:, ::step], control, atol=1e-5, rtol=0)
    # A cubic spline through samples of a constant is that constant.
    weights = synthesis._spline_weights(size, points)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(size), atol=1e-5, rtol=0)


def test_smooth_noise_equals_the_cubic_spline_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="an independent spline to compare with")
    control = rng(1).standard_normal((1, 4, 6), dtype=np.float32)[0].astype(np.float64)
    at = np.meshgrid(np.linspace(0, 3, 15), np.linspace(0, 5, 20), indexing="ij")
    expected = ndimage.map_coordinates(control, at, order=3, mode="mirror")
    field = synthesis.smooth_noise(1, (15, 20), (4, 6), rng(1))[0]
    np.testing.assert_allclose(field.numpy(), expected, atol=1e-5)


def test_smooth_field_scales_each_axis_and_handles_single_voxels_and_points() -> None:
    field = synthesis.smooth_field((6, 1, 5), points=(3, 2, 1), sigma=(1.0, 0.0, 2.0), generator=rng(0))
    noise = synthesis.smooth_noise(3, (6, 1, 5), (3, 2, 1), rng(0))
    assert field.shape == (1, 3, 6, 1, 5)
    torch.testing.assert_close(field[0], noise * torch.tensor([1.0, 0.0, 2.0]).reshape(3, 1, 1, 1))
    assert field[0, 2].std(dim=-1).max() == 0  # one control point: constant along that axis
    with pytest.raises(ValueError, match="sigma expects one number or 3"):
        synthesis.smooth_field((6, 6, 6), 3, (1.0, 2.0), rng(0))
    with pytest.raises(ValueError, match="positive sizes and points"):
        synthesis.smooth_noise(1, (6, 6), 0, rng(0))


@pytest.mark.parametrize("offsets", [(0, 0), (2, -3), (-1, 0), (7, 1), (-9, 9)])
def test_shift_moves_content_and_fills_with_zeros(offsets: tuple[int, int]) -> None:
    image = torch.arange(1, 2 * 5 * 6 + 1).reshape(2, 5, 6)
    moved = synthesis.shift(image, offsets)
    for x in range(5):
        for y in range(6):
            a, b = x - offsets[0], y - offsets[1]
            expected = image[:, a, b] if 0 <= a < 5 and 0 <= b < 6 else torch.zeros(2)
            assert moved[:, x, y].tolist() == expected.tolist()
    assert moved.dtype == image.dtype and moved.data_ptr() != image.data_ptr()
    with pytest.raises(ValueError, match="one offset per spatial axis"):
        synthesis.shift(image, (1, 2, 3))


@pytest.mark.parametrize("shape", [(61, 40), (30, 24, 27)])
@pytest.mark.parametrize("draw", ["labels", "vessels"])
def test_anatomy_keeps_its_margin(shape: tuple[int, ...], draw: str) -> None:
    margin = [3 + k for k in range(len(shape))]
    for seed in range(10):
        if draw == "labels":
            mask = synthesis.label_map(shape, 15, rng(seed), margin)
            assert 5 <= len(mask.unique()) - 1 <= 15
        else:
            mask = synthesis.vessel_tree(shape, rng(seed), margin)
        assert mask.dtype == torch.uint8 and mask.shape == (1, *shape)
        for axis, (size, free) in enumerate(zip(shape, margin), start=1):
            used = mask.amax(dim=[d for d in range(mask.dim()) if d != axis]).nonzero()
            assert free <= used.min() and used.max() <= size - 1 - free


def test_anatomy_refuses_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="no room for anatomy"):
        synthesis.label_map((16, 16), 5, rng(0), margin=7)
    with pytest.raises(ValueError, match="1 to 255 labels, got 300"):
        synthesis.label_map((32, 32), 300, rng(0))
    with pytest.raises(ValueError, match="no room for anatomy"):
        synthesis.synthetic_pair((32, 32), rng(0), max_shift=14)


def test_given_levels_are_painted() -> None:
    labels = torch.zeros(1, 30, 30, dtype=torch.uint8)
    labels[:, 3:15, 3:27], labels[:, 15:27, 3:27] = 1, 2
    levels = np.array([0.3, 0.8])
    image = synthesis.paint(labels, rng(0), levels)
    inside = [float(image[0, rows, 6:24].mean()) for rows in (slice(6, 12), slice(18, 24))]
    assert inside == pytest.approx(levels, abs=0.1)
    with pytest.raises(ValueError, match="a level for each of 2 labels, got 1"):
        synthesis.paint(labels, rng(0), levels[:1])
    drawn = synthesis.random_levels(20, rng(1))
    assert drawn.min() > 0.1 and drawn.max() < 1 and len(set(drawn)) == 20


def test_paint_tells_labels_apart_and_leaves_background_zero() -> None:
    labels = synthesis.label_map((96, 96), 12, rng(2))
    image = synthesis.paint(labels, rng(2))
    assert image.dtype == torch.float32
    assert torch.equal(image != 0, labels != 0)
    assert image[labels != 0].min() >= synthesis.DARKEST and image.max() <= 1
    present = [int(label) for label in labels.unique()[1:]]
    means = torch.stack([image[labels == label].mean() for label in present])
    inside = torch.stack([image[labels == label].std() for label in present])
    assert means.max() - means.min() > 0.4  # contrast between regions ...
    assert inside.median() > 0.01  # ... and texture within them
    with pytest.raises(ValueError, match="paint expects labels"):
        synthesis.paint(torch.full((1, 4, 4), -1), rng(0))


@pytest.mark.parametrize("kind", ["labels", "vessels", "mixed"])
@pytest.mark.parametrize("shape", [(64, 48), (32, 36, 30)])
def test_pairs_are_deterministic_inside_the_canvas_and_different(shape: tuple[int, ...], kind: str) -> None:
    for seed in range(4):
        pair = synthesis.synthetic_pair(shape, rng(seed), kind=kind)
        again = synthesis.synthetic_pair(shape, rng(seed), kind=kind)
        for key, value in pair.items():
            assert torch.equal(value, again[key])
            assert value.shape == (1, *shape)
            assert value.dtype == (torch.uint8 if key.endswith("label") else torch.float32)
            assert 0 <= value.min() and (key.endswith("label") or value.max() <= 1)
            for axis in range(1, value.dim()):
                assert value.select(axis, 0).max() == 0 and value.select(axis, -1).max() == 0
        for side in ("moving", "fixed"):
            # Nearest label content is a part of linearly sampled content: the two move together.
            assert bool((pair[side][pair[f"{side}_label"] != 0] > 0).all())
        assert not torch.equal(pair["moving"], pair["fixed"])
    other = synthesis.synthetic_pair(shape, rng(99), kind=kind)
    assert not torch.equal(other["moving"], pair["moving"])


def test_the_shift_of_a_pair_is_a_whole_number_of_voxels_per_image() -> None:
    still = synthesis.synthetic_pair((64, 64), rng(5), max_shift=0, deformation=0.0, kind="vessels")
    assert torch.equal(still["moving"], still["fixed"])  # no shift, no warp: one anatomy
    pair = synthesis.synthetic_pair((64, 64), rng(5), max_shift=8, deformation=0.0, kind="vessels")
    where = [pair[side][0].nonzero().min(dim=0).values for side in ("moving", "fixed")]
    offset = (where[1] - where[0]).tolist()
    assert max(abs(o) for o in offset) > 0
    assert torch.equal(synthesis.shift(pair["moving"], offset), pair["fixed"])
    assert torch.equal(synthesis.shift(pair["moving_label"], offset), pair["fixed_label"])


def test_warps_of_pairs_are_bounded_and_do_not_fold() -> None:
    for seed in range(5):
        ddf = synthesis._bounded_field((48, 40, 44), (3.84, 3.2, 3.52), rng(seed))
        assert bool((ddf.abs().amax(dim=(0, 2, 3, 4)) <= torch.tensor([3.84, 3.2, 3.52]) + 1e-4).all())
        assert ddf.abs().max() > 1.5
        assert (jacobian_determinant(ddf) <= 0).float().mean() == 0


def test_synthetic_pair_names_what_it_expects() -> None:
    with pytest.raises(ValueError, match="got \\[32\\], 'labels'"):
        synthesis.synthetic_pair((32,), rng(0))
    with pytest.raises(ValueError, match="'blobs'"):
        synthesis.synthetic_pair((32, 32), rng(0), kind="blobs")
    with pytest.raises(ValueError, match="got -1 and 0.08"):
        synthesis.synthetic_pair((32, 32), rng(0), max_shift=-1)
