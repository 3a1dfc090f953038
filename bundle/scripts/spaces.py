"""Pure functions on voxel grids, given as affines that map voxel indices to RAS+ millimeters.

An affine is `(4, 4)`, or `(D + 1, D + 1)`; of a 2D grid only the upper left 2 x 2 block and the first two entries of
the translation count, as MONAI and nibabel give 2D images a `(4, 4)` affine, too. All work is done in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch

__all__ = [
    "apply_affine",
    "covering_grid",
    "four_by_four",
    "nearest_order",
    "origin_offset",
    "reordered",
    "reordered_affine",
    "same_axes",
    "world_matrix",
]

_ROUNDING = 1e-6  # voxels by which a grid may miss a point because of rounding


def world_matrix(affine: torch.Tensor | np.ndarray, dims: int) -> torch.Tensor:
    """Return an affine as the smallest matrix that holds it.

    Args:
        affine: voxel indices, or millimeters, to RAS+ millimeters.
        dims: D, the number of spatial axes.

    Returns:
        `(D + 1, D + 1)`, float64, a copy.

    Raises:
        ValueError: for an affine of another shape, with NaN or infinity, with a spacing of zero, or singular.

    Example:
        >>> world_matrix(torch.eye(4), dims=2).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    steps, origin = _steps_and_origin(affine, dims, "a grid")
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims, :dims], matrix[:dims, dims] = steps, origin
    return matrix


def four_by_four(affine: torch.Tensor) -> torch.Tensor:
    """Return an affine in the form MONAI and nibabel use for images of any dimension.

    Args:
        affine: `(D + 1, D + 1)`, D from 1 to 3.

    Returns:
        `(4, 4)`, float64; the axes a smaller affine lacks are those of the world.

    Example:
        >>> four_by_four(torch.tensor([[2.0, 5.0], [0.0, 1.0]])).tolist()[0]
        [2.0, 0.0, 0.0, 5.0]
    """
    dims = len(affine) - 1
    full = torch.eye(4, dtype=torch.float64)
    full[:dims, :dims], full[:dims, 3] = affine[:dims, :dims], affine[:dims, dims]
    return full


def apply_affine(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Take points through an affine.

    Args:
        affine: `(D + 1, D + 1)`.
        points: `(D, *any)`, in the affine's type.

    Returns:
        `(D, *any)`.

    Example:
        >>> apply_affine(torch.tensor([[2.0, 5.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])).tolist()
        [[5.0, 7.0]]
    """
    dims = len(points)
    shift = affine[:dims, dims].reshape([-1] + [1] * (points.dim() - 1))
    return torch.einsum("ij,j...->i...", affine[:dims, :dims], points) + shift


def nearest_order(
    affine: torch.Tensor | np.ndarray, target_affine: torch.Tensor | np.ndarray, dims: int
) -> tuple[list[int], list[int]]:
    """Return which axes of one array lie nearest to those of another, and whether they run the same way.

    Args:
        affine: voxel indices of the array at hand to RAS+ millimeters.
        target_affine: voxel indices of the array wanted to RAS+ millimeters; its origin does not count.
        dims: D, the number of spatial axes of both.

    Returns:
        For each axis of the array wanted the axis at hand nearest to it, no two the same; and 1, or -1 where that runs
        the other way.

    Raises:
        ValueError: for an affine that `same_axes` refuses.

    Example:
        >>> nearest_order(torch.tensor([[0.1, -1.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), torch.eye(3), dims=2)
        ([1, 0], [-1, 1])
    """
    steps, _ = _steps_and_origin(affine, dims, "the array at hand")
    wanted, _ = _steps_and_origin(target_affine, dims, "the array wanted")
    relative = np.eye(4)
    relative[:dims, :dims] = torch.linalg.solve(wanted / wanted.norm(dim=0), steps / steps.norm(dim=0)).numpy()
    found = nib.orientations.io_orientation(relative)[:dims].astype(
        int
    )  # per axis at hand: which one wanted, which way
    axes = [found[:, 0].tolist().index(axis) for axis in range(dims)]
    return axes, [int(found[axis, 1]) for axis in axes]


def same_axes(
    affine_a: torch.Tensor | np.ndarray, affine_b: torch.Tensor | np.ndarray, dims: int, tolerance: float = 1e-4
) -> bool:
    """Tell whether two grids have the same direction and spacing, wherever they lie.

    Args:
        affine_a: voxel indices of one grid to RAS+ millimeters.
        affine_b: voxel indices of the other grid to RAS+ millimeters.
        dims: D, the number of spatial axes of both.
        tolerance: largest distance, in voxels of `b`, by which a step of one voxel along an axis may differ.

    Returns:
        True if every step agrees.

    Raises:
        ValueError: for an affine of another shape, with NaN or infinity, with a spacing of zero, or singular.

    Example:
        >>> same_axes(torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0])), dims=3)
        False
    """
    a, _ = _steps_and_origin(affine_a, dims, "the first grid")
    b, _ = _steps_and_origin(affine_b, dims, "the second grid")
    return _same_steps(a, b, tolerance)


def origin_offset(
    moving_affine: torch.Tensor | np.ndarray, fixed_affine: torch.Tensor | np.ndarray, dims: int
) -> torch.Tensor:
    """Return where voxel 0 of the moving grid lies among the voxels of the fixed grid.

    As both grids have the same axes, the point at moving index `i` lies at fixed index `i + offset`.

    Args:
        moving_affine: moving voxel indices to RAS+ millimeters.
        fixed_affine: fixed voxel indices to RAS+ millimeters.
        dims: D, the number of spatial axes of both.

    Returns:
        `(D,)`, float64, voxels of the fixed grid along its array axes; not rounded.

    Raises:
        ValueError: if directions or spacings differ, or for whatever `same_axes` refuses.

    Example:
        >>> moving = torch.eye(4)
        >>> moving[:3, 3] = torch.tensor([4.0, 0.0, -1.5])
        >>> origin_offset(moving, torch.eye(4), dims=3).tolist()
        [4.0, 0.0, -1.5]
    """
    steps, origin = _steps_and_origin(fixed_affine, dims, "the fixed grid")
    if not same_axes(moving_affine, fixed_affine, dims):
        moving_steps, _ = _steps_and_origin(moving_affine, dims, "the moving grid")
        raise ValueError(
            "origin_offset expects grids of the same direction and spacing, got moving axes "
            f"{moving_steps.tolist()} and fixed axes {steps.tolist()}; resample one of them first."
        )
    _, moving_origin = _steps_and_origin(moving_affine, dims, "the moving grid")
    return torch.linalg.solve(steps, moving_origin - origin)


def covering_grid(
    moving_affine: torch.Tensor | np.ndarray,
    moving_shape: Sequence[int],
    fixed_affine: torch.Tensor | np.ndarray,
    dims: int,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return the grid with the axes of the fixed grid that covers all of the moving grid.

    It is the bounding box of the moving voxel centers along the fixed axes. Its first voxel is the lower corner of
    that box, not rounded to the fixed voxels: where the axes agree, the moving grid itself comes back.

    Args:
        moving_affine: moving voxel indices to RAS+ millimeters.
        moving_shape: voxels along each of the D moving axes.
        fixed_affine: fixed voxel indices to RAS+ millimeters.
        dims: D, the number of spatial axes of both.

    Returns:
        The affine of the new grid, float64, in the shape of `fixed_affine`, voxel indices to RAS+ millimeters; and its
        number of voxels along each axis.

    Raises:
        ValueError: for a shape that is not D positive numbers, or an affine that `same_axes` refuses.

    Example:
        >>> affine, shape = covering_grid(3 * torch.eye(3), (5, 5), torch.diag(torch.tensor([2.0, -1.0, 1.0])), dims=2)
        >>> affine.tolist(), shape
        ([[2.0, 0.0, 0.0], [0.0, -1.0, 12.0], [0.0, 0.0, 1.0]], (7, 13))
    """
    if len(moving_shape) != dims or min(moving_shape) < 1:
        raise ValueError(f"covering_grid expects a shape of {dims} positive numbers, got {list(moving_shape)}.")
    moving_steps, moving_origin = _steps_and_origin(moving_affine, dims, "the moving grid")
    steps, origin = _steps_and_origin(fixed_affine, dims, "the fixed grid")
    # A box under a linear map spans, along each new axis, the sum of what its edges contribute, each with its sign.
    edges = torch.linalg.solve(steps, moving_steps) * (torch.tensor(list(moving_shape)) - 1)
    corner = torch.linalg.solve(steps, moving_origin - origin) + edges.clamp(max=0).sum(dim=1)
    extent = edges.abs().sum(dim=1)
    affine = torch.as_tensor(fixed_affine, dtype=torch.float64, device="cpu").clone()
    affine[:dims, -1] = origin + steps @ corner
    return affine, tuple(int(size) + 1 for size in (extent - _ROUNDING).ceil())


def reordered(values: torch.Tensor, axes: Sequence[int], signs: Sequence[int]) -> torch.Tensor:
    """Permute and flip the spatial axes of an image; no value is interpolated.

    Args:
        values: `(C, *shape)`.
        axes: for each axis of the result, the axis of `values` it is, 0 to D - 1.
        signs: for each axis of the result, -1 to reverse it, else 1.

    Returns:
        The same values `(C, *new shape)`, on the grid `reordered_affine` gives.

    Raises:
        ValueError: if the axes are no permutation, or the signs not -1 or 1.

    Example:
        >>> reordered(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), axes=[1, 0], signs=[-1, 1]).tolist()
        [[[2.0], [1.0]], [[4.0], [3.0]]]
    """
    _check_order(axes, signs, values.dim() - 1)
    turned = values.permute(0, *(axis + 1 for axis in axes))
    return turned.flip([i + 1 for i, sign in enumerate(signs) if sign < 0]).contiguous()


def reordered_affine(
    affine: torch.Tensor | np.ndarray, shape: Sequence[int], axes: Sequence[int], signs: Sequence[int]
) -> torch.Tensor:
    """Return the affine of an array after `reordered`: every voxel stays where it is in the world.

    Args:
        affine: voxel indices of the array to RAS+ millimeters.
        shape: voxels along each of its D axes.
        axes: as for `reordered`.
        signs: as for `reordered`.

    Returns:
        Voxel indices of the reordered array to RAS+ millimeters, float64, in the shape of `affine`.

    Raises:
        ValueError: if the axes are no permutation, the signs not -1 or 1, or for an affine that `same_axes` refuses.

    Example:
        >>> reordered_affine(torch.eye(3), shape=(4, 6), axes=[1, 0], signs=[-1, 1]).tolist()
        [[0.0, 1.0, 0.0], [-1.0, 0.0, 5.0], [0.0, 0.0, 1.0]]
    """
    dims = len(shape)
    _check_order(axes, signs, dims)
    _steps_and_origin(affine, dims, "the array")
    given = torch.as_tensor(affine, dtype=torch.float64, device="cpu")
    old_from_new = torch.eye(len(given), dtype=torch.float64)
    old_from_new[:dims, :dims] = 0
    for new, (old, sign) in enumerate(zip(axes, signs)):
        old_from_new[old, new] = sign
        if sign < 0:
            old_from_new[old, -1] = shape[old] - 1
    return given @ old_from_new


def _same_steps(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Tell whether steps `(D, D)`, in columns, agree up to that share of a voxel of `b`."""
    return bool((torch.linalg.norm(a - b, dim=0) <= tolerance * torch.linalg.norm(b, dim=0)).all())


def _check_order(axes: Sequence[int], signs: Sequence[int], dims: int) -> None:
    """Refuse what does not reorder D axes."""
    if sorted(axes) != list(range(dims)) or len(signs) != dims or not set(signs) <= {-1, 1}:
        raise ValueError(
            f"expected the axes 0 to {dims - 1} in any order, and -1 or 1 for each, got {list(axes)} and {list(signs)}."
        )


def _steps_and_origin(affine: torch.Tensor | np.ndarray, dims: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Check an affine; return the step `(D, D)` along each axis, in its columns, and voxel 0 `(D,)`, both in mm."""
    given = torch.as_tensor(affine, dtype=torch.float64, device="cpu")
    if dims not in (1, 2, 3) or given.shape not in ((4, 4), (dims + 1, dims + 1)):
        raise ValueError(f"The affine of {name}, {dims}D, should have shape (4, 4), got {tuple(given.shape)}.")
    steps, origin = given[:dims, :dims], given[:dims, -1]
    spacing = torch.linalg.norm(steps, dim=0)
    if not bool(torch.isfinite(given).all()) or not bool(spacing.min() > 0):
        raise ValueError(f"The affine of {name} should be finite with positive spacing, got {given.tolist()}.")
    if not bool(torch.linalg.det(steps / spacing).abs() > 1e-6):
        raise ValueError(f"The affine of {name} should be invertible in its {dims} axes, got {given.tolist()}.")
    return steps, origin
