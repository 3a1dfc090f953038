"""Boxes and grid shifts against loops over samples and voxels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers_networks import SMALL, content, place
from torch import nn

from equireg.networks import CARL, CoordinateAttention, DisplacementUNet
from equireg.networks.active import (
    box_mask,
    check_pair,
    clamp_to_box,
    content_box,
    field_of_view,
    has_content,
    is_count,
    keep_if_content,
    pad_all,
    shift_grid,
)

SHAPES = [(9,), (7, 10), (5, 6, 7)]


def sparse(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Four samples of two channels with a few voxels of content each, negative ones too; the third one is empty."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 2, *shape, generator=generator)
    values = values * (torch.rand(values.shape, generator=generator) < 3 / values[0].numel())
    values[2] = 0.0
    values[3, 1, ..., -1] = 1e-30
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_content_box_equals_numpy(shape: tuple[int, ...], seed: int) -> None:
    image = sparse(shape, seed)
    first, last = content_box(image)
    assert first.dtype == last.dtype == torch.long
    for b, sample in enumerate(image.numpy()):
        found = np.argwhere((sample != 0).any(axis=0))
        expected = (found.min(0), found.max(0)) if len(found) else (np.zeros(len(shape)), np.array(shape) - 1)
        np.testing.assert_array_equal(first[b], expected[0])
        np.testing.assert_array_equal(last[b], expected[1])
    assert has_content(image).tolist() == [bool((s != 0).any()) for s in image]
    assert not has_content(image)[2]


def ellipsoid(dims: int) -> torch.Tensor:
    """Return an ellipsoid, `(1, 1, *shape)`, alone on its canvas; its box is not that of the canvas."""
    at = torch.stack(torch.meshgrid(*[torch.arange(56.0)] * dims, indexing="ij"))
    center, radii = (torch.tensor(values[:dims]).reshape(-1, *[1] * dims) for values in ((28, 27.5, 29), (22, 24, 20)))
    return (((at - center) / radii).square().sum(dim=0) <= 1).float()[None, None]


@pytest.mark.parametrize("dims", [2, 3])
def test_field_of_view_ends_where_an_object_is_cut(dims: int) -> None:
    """One side at a time, deep and shallow, where the canvas ends as well; an object alone, and none."""
    whole = ellipsoid(dims)
    (low,), (high,) = content_box(whole)
    images, firsts, lasts = [whole, torch.zeros_like(whole)], [[-np.inf] * dims] * 2, [[np.inf] * dims] * 2
    for axis in range(dims):
        for by in (3, 12):
            image = whole.clone().transpose(2, 2 + axis)
            image[:, :, : low[axis] + by] = 0
            images.append(image.transpose(2, 2 + axis))
            firsts.append([low[axis].item() + by if k == axis else -np.inf for k in range(dims)])
            lasts.append([np.inf] * dims)
            images.append(images[-1].flip(2 + axis))
            firsts.append([-np.inf] * dims)
            lasts.append([55 - low[axis].item() - by if k == axis else np.inf for k in range(dims)])
    first, last = field_of_view(torch.cat(images))
    assert first.dtype == last.dtype == torch.float64
    assert first.tolist() == firsts and last.tolist() == lasts
    cropped = whole[(..., *(slice(a + 4, b - 4) for a, b in zip(low, high)))]  # fills its canvas
    first, last = field_of_view(cropped)
    assert (first == 0).all() and last[0].tolist() == [size - 1 for size in cropped.shape[2:]]
    several = torch.cat([torch.zeros_like(cropped), cropped], dim=1)  # content is that of any channel
    assert torch.equal(field_of_view(several)[1], last)


@pytest.mark.parametrize("dims", [2, 3])
def test_no_ball_passes_for_cut_and_halves_do(dims: int) -> None:
    at = torch.stack(torch.meshgrid(*[torch.arange(36.0)] * dims, indexing="ij"))
    for radius in np.arange(0.6, 16, 0.7):
        for center in (17.0, 17.5, 17.3):
            ball = ((at - center).square().sum(dim=0) <= radius**2).float()[None, None]
            first, last = field_of_view(ball)
            assert (first == -np.inf).all() and (last == np.inf).all()
            half = ball.clone()
            half[:, :, :17] = 0
            assert field_of_view(half)[0][0, 0] == 17 or radius < 7


@pytest.mark.parametrize("shape", SHAPES)
def test_box_mask_equals_a_loop(shape: tuple[int, ...]) -> None:
    """Each sample has its own box; boxes reach over the grid and one is empty."""
    first = torch.randint(-3, 4, (6, len(shape)))
    last = first + torch.randint(0, 9, (6, len(shape)))
    last[5] = first[5] - 1
    mask = box_mask(first, last, list(shape))
    assert mask.shape == (6, 1, *shape) and mask.dtype == torch.bool
    for b in range(6):
        for at in np.ndindex(*shape):
            assert mask[(b, 0, *at)] == all(f <= x <= e for f, x, e in zip(first[b], at, last[b]))


@pytest.mark.parametrize("shape", SHAPES)
def test_clamp_to_box_takes_the_nearest_value_inside(shape: tuple[int, ...]) -> None:
    values = torch.rand(4, 3, *shape)
    first = torch.randint(0, 3, (4, len(shape)))
    last = first + torch.randint(0, 3, (4, len(shape)))
    clamped = clamp_to_box(values, first, last)
    for b in range(4):
        for at in np.ndindex(*shape):
            nearest = np.clip(at, first[b].numpy(), last[b].numpy())
            assert torch.equal(clamped[(b, slice(None), *at)], values[(b, slice(None), *nearest)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_shift_grid_equals_a_loop(shape: tuple[int, ...], padding: str) -> None:
    values = torch.rand(4, 2, *shape) + 0.5
    offset = torch.randint(-4, 5, (4, len(shape)))
    offset[0] = 100  # all outside
    target = [n + d for n, d in zip(shape, (2, -3, 1))]
    shifted = shift_grid(values, offset, target, padding)
    assert list(shifted.shape) == [4, 2, *target]
    for b in range(4):
        for at in np.ndindex(*target):
            source = np.array(at) + offset[b].numpy()
            nearest = np.clip(source, 0, np.array(shape) - 1)
            expected = values[(b, slice(None), *nearest)]
            if padding == "zeros" and (nearest != source).any():
                expected = torch.zeros(2)
            assert torch.equal(shifted[(b, slice(None), *at)], expected)


def test_shift_grid_passes_gradients() -> None:
    values = torch.rand(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([[1, -1], [0, 2]])
    for padding in ("zeros", "border"):
        assert torch.autograd.gradcheck(lambda v, p=padding: shift_grid(v, offset, [5, 4], p), (values,))


def test_keep_if_content_is_per_sample() -> None:
    images = place(content(2, 2, batch=4), (5, 5), (1, 2))
    moving, fixed = images.clone(), images.clone()
    moving[1], fixed[2] = 0.0, 0.0
    ddf = torch.rand(4, 2, 5, 5, requires_grad=True)
    kept = keep_if_content(ddf, moving, fixed)
    assert torch.equal(kept[[0, 3]], ddf[[0, 3]]) and (kept[[1, 2]] == 0).all()
    kept.sum().backward()
    assert ddf.grad[:, 0, 0, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_pad_all() -> None:
    image = content(3, 4, 5)
    assert torch.equal(pad_all(image, 2), place(image, (7, 8, 9), (2, 2, 2)))


@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        ((1, 1, 4), (1, 1, 4, 4), r"the moving image must have 4 axes .*got shape \[1, 1, 4\]"),
        ((1, 1, 4, 4), (1, 1, 4, 4, 4), r"the fixed image must have 4 axes .*got shape \[1, 1, 4, 4, 4\]"),
        ((1, 1, 4, 4), (1, 2, 4, 4), r"the fixed image must have 1 channel\(s\), got 2"),
        ((1, 1, 4, 0), (1, 1, 4, 4), r"must not have an empty axis, got shape \[1, 1, 4, 0\]"),
        ((2, 1, 4, 4), (3, 1, 4, 4), r"one batch size, got 2 and 3"),
    ],
)
def test_check_pair_refuses(moving: tuple[int, ...], fixed: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pair(torch.zeros(moving), torch.zeros(fixed), spatial_dims=2, in_channels=1)
    check_pair(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, 9), spatial_dims=2, in_channels=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["moving", "fixed"])
def test_check_pair_refuses_values_that_are_not_finite(name: str, value: float) -> None:
    images = {"moving": content(4, 5, batch=2), "fixed": content(5, 4, batch=2)}
    check_pair(**images, spatial_dims=2, in_channels=1)
    images[name][1, 0, 2:4, 3] = value
    with pytest.raises(ValueError, match=rf"the {name} image must be finite, got 2 voxel value\(s\)"):
        check_pair(**images, spatial_dims=2, in_channels=1)


@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        (torch.int16, torch.float32, "the moving image must be of a floating point type, got torch.int16"),
        (torch.float32, torch.bool, "the fixed image must be of a floating point type, got torch.bool"),
        (torch.float32, torch.float64, "of one type on one device, got torch.float32 on cpu and torch.float64 on cpu"),
    ],
)
def test_check_pair_refuses_types(moving: torch.dtype, fixed: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pair(torch.ones(1, 1, 4, 4, dtype=moving), torch.ones(1, 1, 4, 4, dtype=fixed), 2, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CARL, CoordinateAttention, DisplacementUNet])
def test_images_of_another_type_than_the_network_are_refused(kind: Callable[..., nn.Module]) -> None:
    network = kind(2, **(SMALL if kind is CARL else {}))
    for other in (torch.float16, torch.bfloat16, torch.float64):
        image = torch.rand(1, 1, 16, 16).to(other)
        with pytest.raises(ValueError, match=f"of the network's type torch.float32, got {other}"):
            network(image, image)
    image = torch.rand(1, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(network(image.bfloat16(), image.bfloat16())).all()
        with pytest.raises(ValueError, match="got torch.float16"):
            network(image.half(), image.half())
    assert network.double()(image.double(), image.double()).dtype == torch.float64


def test_check_pair_refuses_two_devices() -> None:
    with pytest.raises(ValueError, match="one device, got torch.float32 on cpu and torch.float32 on meta"):
        check_pair(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4, device="meta"), 2, 1)


def test_is_count() -> None:
    assert is_count(2, 2) and not is_count(1, 2)
    assert not any(is_count(value, 1) for value in (2.0, 2.5, None, "2", True, [2]))
