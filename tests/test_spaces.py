"""Grids in the world: where they lie and what they cover, against plain linear algebra."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch

from equireg.spaces import (
    apply_affine,
    covering_grid,
    four_by_four,
    nearest_order,
    origin_offset,
    reordered,
    reordered_affine,
    same_axes,
    world_matrix,
)


def random_affine(dims: int, seed: int, size: int = 4) -> np.ndarray:
    """An oblique, anisotropic grid, left- or right-handed, far from the origin, as a `(size, size)` affine."""
    generator = np.random.default_rng(seed)
    direction, _ = np.linalg.qr(generator.standard_normal((dims, dims)))
    affine = np.eye(size)
    affine[:dims, :dims] = direction * generator.uniform(0.4, 3, dims)
    affine[:dims, -1] = generator.uniform(-100, 100, dims)
    return affine


def corners(shape: tuple[int, ...]) -> np.ndarray:
    """Indices `(2**D, D)` of the voxels in the corners."""
    return np.array(list(product(*((0, size - 1) for size in shape))))


def to_world(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    dims = points.shape[1]
    return points @ affine[:dims, :dims].T + affine[:dims, -1]


CASES = [(dims, seed) for dims in (1, 2, 3) for seed in range(6)]
SHAPES = {1: (8,), 2: (7, 12), 3: (5, 9, 14)}


@pytest.mark.parametrize("dims, seed", CASES)
def test_covering_grid_is_the_smallest_that_holds_every_moving_voxel(dims: int, seed: int) -> None:
    moving, fixed = random_affine(dims, seed), random_affine(dims, seed + 100)
    affine, shape = covering_grid(torch.from_numpy(moving), SHAPES[dims], fixed, dims)
    assert affine.dtype == torch.float64 and same_axes(affine, fixed, dims, tolerance=0)
    found = np.linalg.solve(
        affine[:dims, :dims].numpy(), (to_world(moving, corners(SHAPES[dims])) - affine[:dims, -1].numpy()).T
    )
    np.testing.assert_allclose(found.min(axis=1), 0, atol=1e-9)
    highest = found.max(axis=1)
    assert (highest <= np.array(shape) - 1 + 2e-6).all()
    assert (highest > np.array(shape) - 2).all()


@pytest.mark.parametrize("dims, seed", CASES)
def test_grid_of_the_same_axes_covers_itself(dims: int, seed: int) -> None:
    moving, fixed = random_affine(dims, seed), random_affine(dims, seed)
    fixed[:dims, -1] += np.pi
    affine, shape = covering_grid(moving, SHAPES[dims], fixed, dims)
    assert shape == SHAPES[dims]
    np.testing.assert_allclose(affine, moving, atol=1e-9)


@pytest.mark.parametrize("dims, seed", CASES)
def test_origin_offset_names_the_same_point_in_both_grids(dims: int, seed: int) -> None:
    fixed = random_affine(dims, seed)
    moving = fixed.copy()
    moving[:dims, -1] = np.random.default_rng(seed).uniform(-50, 50, dims)
    offset = origin_offset(moving, torch.from_numpy(fixed), dims)
    assert offset.shape == (dims,) and offset.dtype == torch.float64
    points = np.random.default_rng(seed + 1).uniform(-20, 20, (10, dims))
    np.testing.assert_allclose(to_world(fixed, points + offset.numpy()), to_world(moving, points), atol=1e-9)


def test_two_dimensional_grids_ignore_the_axis_they_lack() -> None:
    small_moving, small_fixed = random_affine(2, 0, size=3), random_affine(2, 1, size=3)
    moving, fixed = random_affine(2, 0), random_affine(2, 1)
    moving[2, 2], fixed[2, 2], fixed[2, 3] = 7, 5, -3
    small, shape = covering_grid(small_moving, (4, 6), small_fixed, 2)
    large, same_shape = covering_grid(moving, (4, 6), fixed, 2)
    assert shape == same_shape and small.shape == (3, 3) and large.shape == (4, 4)
    np.testing.assert_allclose(large[:2, [0, 1, 3]], small[:2], atol=1e-12)
    assert large[2].tolist() == [0, 0, 5, -3]
    moving[:2, :2] = fixed[:2, :2]
    assert same_axes(moving, fixed, 2) and not same_axes(moving, fixed, 3)


def test_same_axes_judges_steps_by_the_voxel_and_not_by_the_millimeter() -> None:
    affine = random_affine(3, 4)
    for unit in (1e-4, 1.0, 1e4):
        scaled = affine * [[unit], [unit], [unit], [1]]
        for change, same in [(0.9e-4, True), (1.1e-4, False)]:
            turned = scaled.copy()  # the second axis leans by that share of a voxel towards the third
            turned[:3, 1] += change * np.linalg.norm(scaled[:3, 1]) * scaled[:3, 2] / np.linalg.norm(scaled[:3, 2])
            for other in (scaled * [1, 1 + change, 1, 1], turned):
                assert same_axes(other, scaled, 3) is same
                assert same_axes(other, scaled, 3, tolerance=2e-4)
    assert not same_axes(affine, affine * [1, -1, 1, 1], 3)
    moved = affine.copy()
    moved[:3, 3] += 1000
    assert same_axes(torch.from_numpy(moved).float(), affine, 3)


def test_affines_are_left_as_they_were() -> None:
    moving, fixed = random_affine(3, 0), random_affine(3, 1)
    before = moving.copy(), fixed.copy()
    affine, _ = covering_grid(moving, (3, 4, 5), fixed, 3)
    affine.zero_()
    assert np.array_equal(moving, before[0]) and np.array_equal(fixed, before[1])


FLAT = np.eye(4)[:, [0, 0, 2, 3]]
BAD = {
    "shape": (np.eye(5), r"should have shape \(4, 4\), got \(5, 5\)"),
    "shape of a 2D grid": (np.eye(3), r"should have shape \(4, 4\), got \(3, 3\)"),
    "zero spacing": (np.diag([1.0, 0, 1, 1]), "positive spacing, got"),
    "NaN": (np.full((4, 4), np.nan), "finite with positive spacing, got"),
    "singular": (FLAT, "invertible in its 3 axes, got"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_affines_are_named(name: str) -> None:
    affine, message = BAD[name]
    good = np.eye(4)
    for call in (
        lambda: same_axes(affine, good, 3),
        lambda: same_axes(good, affine, 3),
        lambda: origin_offset(good, affine, 3),
        lambda: origin_offset(affine, good, 3),
        lambda: covering_grid(good, (2, 2, 2), affine, 3),
        lambda: covering_grid(affine, (2, 2, 2), good, 3),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_upright_slices_differing_axes_and_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="invertible in its 2 axes|positive spacing"):
        same_axes(np.eye(4), np.eye(4)[[0, 2, 1, 3]], 2)
    with pytest.raises(ValueError, match="same direction and spacing, got moving axes .*2.0.* and fixed axes"):
        origin_offset(np.diag([2.0, 1, 1, 1]), np.eye(4), 3)
    for shape in [(3, 4), (3, 0, 4)]:
        with pytest.raises(ValueError, match="a shape of 3 positive numbers, got"):
            covering_grid(np.eye(4), shape, np.eye(4), 3)


ORDERS = [
    (axes, signs) for dims in (1, 2, 3) for axes in permutations(range(dims)) for signs in product((-1, 1), repeat=dims)
]


@pytest.mark.parametrize("axes, signs", ORDERS)
def test_reordering_keeps_every_voxel_in_the_world(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    dims = len(axes)
    shape, affine = SHAPES[dims], random_affine(dims, seed=7)
    image = torch.rand(2, *shape)
    kept = image.clone()
    new_affine = reordered_affine(affine, shape, axes, signs)
    new_image = reordered(image, axes, signs)
    assert new_affine.shape == (4, 4) and new_image.shape[1:] == tuple(shape[axis] for axis in axes)
    # Every voxel of the new array, found again in the old one through the world.
    index = np.indices(new_image.shape[1:]).reshape(dims, -1).T
    old = np.linalg.solve(affine[:dims, :dims], (to_world(new_affine.numpy(), index) - affine[:dims, -1]).T)
    assert np.abs(old - old.round()).max() < 1e-9
    where, here = tuple(old.round().astype(int)), tuple(index.T)
    assert torch.equal(new_image[(slice(None), *here)], image[(slice(None), *where)])
    assert torch.equal(image, kept)


@pytest.mark.parametrize("axes, signs", ORDERS)
def test_the_nearest_order_finds_the_way_there_and_back(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    dims = len(axes)
    affine, image = random_affine(dims, seed=8), torch.rand(1, *SHAPES[dims])
    there = reordered_affine(affine, SHAPES[dims], axes, signs)
    tilted = there.clone()
    tilted[:dims, :dims] *= 1 + 0.05 * torch.randn(dims, dims)  # near is enough
    assert nearest_order(affine, tilted, dims) == (list(axes), list(signs))
    moved = reordered(image, axes, signs)
    back = nearest_order(there, affine, dims)
    assert torch.equal(reordered(moved, *back), image)
    np.testing.assert_allclose(reordered_affine(there, moved.shape[1:], *back), affine, atol=1e-12)


def test_what_is_no_order_is_refused() -> None:
    values = torch.zeros(3, 4, 5)
    for axes, signs in [([0, 0], [1, 1]), ([0, 1, 2], [1, 1, 1]), ([1, 2], [1, 1]), ([0, 1], [1]), ([0, 1], [1, 0])]:
        for call in (lambda a, s: reordered(values, a, s), lambda a, s: reordered_affine(np.eye(4), (4, 5), a, s)):
            with pytest.raises(ValueError, match="expected the axes 0 to 1 in any order, and -1 or 1 for each, got"):
                call(axes, signs)


@pytest.mark.parametrize("dims", [2, 3])
def test_small_helpers_against_numpy(dims: int) -> None:
    affine = random_affine(dims, seed=9)
    small = world_matrix(affine, dims)
    points = torch.rand(dims, 3, 5, dtype=torch.float64)
    expected = np.einsum("ij,jkl->ikl", affine[:dims, :dims], points.numpy()) + affine[:dims, -1].reshape(dims, 1, 1)
    np.testing.assert_allclose(apply_affine(small, points), expected, atol=1e-12)
    full = four_by_four(small)
    assert torch.equal(world_matrix(full, dims), small) and full.shape == (4, 4)
    assert torch.equal(full[dims:, dims:3], torch.eye(4, dtype=torch.float64)[dims:, dims:3])
