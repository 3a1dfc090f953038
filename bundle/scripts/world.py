"""Transforms between images on any grids: dense fields and affines, applied to images and points, chained, inverted.

A *displacement field* is a `MetaTensor` `(D, *shape)`: a ddf in voxels of its own grid, placed in the world by its
affine `A` (voxel index to RAS+ millimeters), so that it takes the world point `A(x)` to `A(x + ddf(x))`; between voxels
it is interpolated linearly, outside its grid it continues as its border values. A *transform* is a list of steps in the
order in which points pass through them, each an affine `(D + 1, D + 1)` on RAS+ millimeters or a displacement field.
Transforms are named by the way points go: the image on a fixed grid is made by looking up `fixed_to_moving` of every
fixed voxel.

All positions are computed in float64. Grids are worked on block by block, and of what is sampled only the part that a
block reads is converted to float64: memory stays that of the result, and what is temporary stays in the processor's
cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor

from .blocks import block_indices, for_blocks, mapped_indices, sample, sample_scattered, spaced_voxels
from .spaces import apply_affine, four_by_four, world_matrix

__all__ = [
    "affine_inverse",
    "as_field",
    "best_affine",
    "field_affine",
    "index_displacement",
    "invert_field",
    "invert_transform",
    "map_points",
    "resample",
    "sample_transform",
    "split_affine",
    "warp_image",
]

_FIT_SAMPLES = 100_000  # voxels that determine an affine of 12 numbers more than well enough
_COARSE = 4  # voxels between those whose inverse is found first, from where the others start


def as_field(ddf: torch.Tensor, affine: torch.Tensor | np.ndarray) -> MetaTensor:
    """Place a ddf in the world.

    Args:
        ddf: `(D, *shape)`, voxels of its grid.
        affine: voxel indices of that grid to RAS+ millimeters, `(4, 4)` or `(D + 1, D + 1)`.

    Returns:
        A displacement field, float32, with a `(4, 4)` float64 affine.

    Raises:
        ValueError: if the number of channels is not that of the axes, or for an affine that `spaces` refuses.

    Example:
        >>> as_field(torch.zeros(2, 4, 5), torch.eye(3)).affine.shape
        torch.Size([4, 4])
    """
    dims = ddf.dim() - 1
    if dims not in (2, 3) or ddf.shape[0] != dims:
        raise ValueError(f"a displacement field has shape (D, *shape) with D = 2 or 3, got {list(ddf.shape)}.")
    return MetaTensor(_values(ddf).float(), affine=four_by_four(world_matrix(affine, dims)))


def field_affine(field: torch.Tensor) -> torch.Tensor:
    """Return the affine of an image or displacement field, voxel index to RAS+ millimeters.

    Args:
        field: a `MetaTensor` `(C, *shape)`.

    Returns:
        `(D + 1, D + 1)`, float64.

    Raises:
        ValueError: if the tensor has no affine, or one that `spaces` refuses.
    """
    if not isinstance(field, MetaTensor):
        raise ValueError(f"expected a MetaTensor, whose affine places it in the world, got {type(field).__name__}.")
    return world_matrix(field.affine, field.dim() - 1)


def map_points(points_mm: torch.Tensor, transform: Sequence[torch.Tensor]) -> torch.Tensor:
    """Take points through a transform.

    Args:
        points_mm: `(N, D)`, RAS+ millimeters.
        transform: the steps, first to last.

    Returns:
        `(N, D)`, float64, RAS+ millimeters.

    Raises:
        ValueError: if a step has another number of axes than the points.

    Example:
        >>> shift = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> map_points(torch.zeros(1, 2), [shift, shift]).tolist()
        [[10.0, 0.0]]
    """
    points = _values(points_mm).to(torch.float64)
    return _move(points.T, _prepared(transform, points.shape[1])).T


def sample_transform(
    transform: Sequence[torch.Tensor], affine: torch.Tensor | np.ndarray, shape: Sequence[int]
) -> MetaTensor:
    """Evaluate a transform at every voxel of a grid, which chains all its steps into one field.

    Args:
        transform: the steps, first to last.
        affine: voxel indices of the grid to RAS+ millimeters.
        shape: voxels along each of its D axes.

    Returns:
        The displacement field `(D, *shape)` on that grid.

    Raises:
        ValueError: if a step has another number of axes.

    Example:
        >>> shift = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> sample_transform([shift], torch.diag(torch.tensor([2.0, 2.0, 1.0])), (3, 4))[:, 0, 0].tolist()
        [2.5, 0.0]
    """
    dims = len(shape)
    grid = world_matrix(affine, dims)
    steps, to_grid = _prepared(transform, dims), torch.linalg.inv(grid)
    ddf = mapped_indices(shape, lambda index, _: apply_affine(to_grid, _move(apply_affine(grid, index), steps)))
    return as_field(ddf, grid)


def warp_image(image: torch.Tensor, field: torch.Tensor, mode: str = "linear", background: float = 0.0) -> MetaTensor:
    """Bring an image through a displacement field onto its grid: `moved(x) = image(fixed_to_moving(x))`.

    Args:
        image: `(C, *shape)`, a `MetaTensor` on any grid; integer images need `mode="nearest"` and keep their values up
            to 2^53.
        field: a displacement field `(D, *fixed shape)`, from points of its grid to points of the image.
        mode: "linear" or "nearest" interpolation.
        background: the value outside the image, and between its outermost voxels and one voxel further, where the
            image fades into it.

    Returns:
        `(C, *fixed shape)` in the image's type, with the affine of the field.

    Raises:
        ValueError: if image or field has no affine, if their numbers of axes differ, or if integers are to be blended.

    Example:
        >>> image = MetaTensor(torch.tensor([[[1.0, 2.0, 3.0]]]), affine=torch.eye(4))
        >>> warp_image(image, as_field(torch.stack([torch.zeros(1, 2), torch.ones(1, 2)]), torch.eye(4))).tolist()
        [[[2.0, 3.0]]]
    """
    dims = field.dim() - 1
    if image.dim() != field.dim() or field.shape[0] != dims:
        raise ValueError(
            f"warp_image expects an image (C, *shape) and a field (D, *shape) of as many axes, got "
            f"{list(image.shape)} and {list(field.shape)}."
        )
    to_image = torch.linalg.inv(field_affine(image)) @ field_affine(field)
    if mode == "linear" and not image.is_floating_point():
        raise ValueError(f"warp_image expects a floating point image for mode 'linear', got {image.dtype}.")
    ddf, values = _values(field), _values(image)
    moved = torch.empty([values.shape[0], *field.shape[1:]], dtype=image.dtype)

    def work(where: tuple[slice, ...]) -> None:
        position = apply_affine(to_image, block_indices(where) + ddf[where])
        moved[where] = sample(values, position, mode, "zeros", background).to(image.dtype)

    for_blocks(field.shape[1:], work)
    return MetaTensor(moved, affine=four_by_four(field_affine(field)))


def resample(
    image: torch.Tensor, affine: torch.Tensor | np.ndarray, shape: Sequence[int], mode: str = "linear"
) -> MetaTensor:
    """Sample an image on another grid; it stays where it lies in the world.

    Args:
        image: `(C, *shape)`, a `MetaTensor`; 0 outside.
        affine: voxel indices of the grid to RAS+ millimeters.
        shape: voxels along each of its axes.
        mode: as for `warp_image`.

    Returns:
        `(C, *new shape)` in the image's type, with the affine of the grid.

    Raises:
        ValueError: as `warp_image`.

    Example:
        >>> image = MetaTensor(torch.tensor([[[1.0, 2.0, 3.0]]]), affine=torch.eye(4))
        >>> resample(image, torch.diag(torch.tensor([1.0, 2.0, 1.0])), (1, 2)).tolist()
        [[[1.0, 3.0]]]
    """
    still = torch.zeros(1).expand(len(shape), *shape)  # takes no memory
    return warp_image(image, as_field(still, affine), mode)


def best_affine(field: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Fit an affine to a displacement field by least squares over its voxels.

    Where the voxels do not determine it (a single slice, a single voxel), the affine is the one closest to a
    translation.

    Args:
        field: a displacement field `(D, *shape)`.
        mask: `(*shape)` or `(1, *shape)`, boolean, the voxels that count; all of them if left out or if none is true.

    Returns:
        `(D + 1, D + 1)`, float64, on RAS+ millimeters.

    Raises:
        ValueError: if the field has no affine, or the mask another shape.

    Example:
        >>> from .fields import identity_grid
        >>> grid = identity_grid([4, 5])[0]
        >>> best_affine(as_field(0.5 * grid + 3.0, torch.eye(3))).round(decimals=6).tolist()
        [[1.5, 0.0, 3.0], [0.0, 1.5, 3.0], [0.0, 0.0, 1.0]]
    """
    dims = field.dim() - 1
    if mask is not None and mask.numel() != field[0].numel():
        raise ValueError(f"best_affine expects a mask of shape {list(field.shape[1:])}, got {list(mask.shape)}.")
    mask = None if mask is None or not bool(mask.any()) else mask
    chosen = spaced_voxels(field.shape[1:], mask, _FIT_SAMPLES)
    grid = field_affine(field)
    index = torch.stack(torch.unravel_index(chosen, field.shape[1:])).to(torch.float64)
    displacement = _values(field).flatten(1)[:, chosen].to(torch.float64)
    points, shift = apply_affine(grid, index), grid[:dims, :dims] @ displacement
    center, mean = points.mean(dim=1, keepdim=True), shift.mean(dim=1, keepdim=True)
    slope = (torch.linalg.pinv((points - center).T, rtol=1e-9) @ (shift - mean).T).T
    affine = torch.eye(dims + 1, dtype=torch.float64)
    affine[:dims, :dims] += slope
    affine[:dims, dims:] = mean - slope @ center
    return affine


def split_affine(field: torch.Tensor, affine: torch.Tensor) -> list[torch.Tensor]:
    """Split a displacement field into what an affine does not explain, and that affine.

    Args:
        field: a displacement field `(D, *shape)`.
        affine: `(D + 1, D + 1)`, RAS+ millimeters, such as its `best_affine`.

    Returns:
        Two steps, a displacement field and then the affine, that take points where the field does.

    Raises:
        ValueError: if the affine has no inverse.

    Example:
        >>> rest, affine = split_affine(as_field(torch.ones(2, 4, 4), torch.eye(3)), torch.eye(3))
        >>> rest.unique().tolist(), affine.shape
        ([1.0], torch.Size([3, 3]))
    """
    rest = sample_transform([field, affine_inverse(affine)], field_affine(field), field.shape[1:])
    return [rest, affine.to(torch.float64)]


def index_displacement(field: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Count a displacement field in voxels of the array it looks up: the ddf that `equireg.fields.warp` takes.

    Args:
        field: a displacement field `(D, *fixed shape)`, from points of its grid to points of the image.
        image: `(C, *moving shape)`, a `MetaTensor`; only its affine counts.

    Returns:
        `(D, *fixed shape)`, float32, voxels: index of the image minus index of the field.

    Raises:
        ValueError: if field or image has no affine, or they differ in their numbers of axes.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 4, 4), affine=torch.diag(torch.tensor([1.0, 0.5, 1.0, 1.0])))
        >>> index_displacement(as_field(torch.ones(2, 2, 2), torch.eye(3)), image)[:, 1, 1].tolist()
        [1.0, 3.0]
    """
    to_image, ddf = torch.linalg.inv(field_affine(image)) @ field_affine(field), _values(field)
    return mapped_indices(field.shape[1:], lambda index, where: apply_affine(to_image, index + ddf[where]))


def affine_inverse(affine: torch.Tensor) -> torch.Tensor:
    """Return the affine that undoes an affine.

    Args:
        affine: `(D + 1, D + 1)`, RAS+ millimeters.

    Returns:
        `(D + 1, D + 1)`, float64.

    Raises:
        ValueError: if there is none.

    Example:
        >>> affine_inverse(torch.diag(torch.tensor([2.0, 4.0, 1.0]))).diagonal().tolist()
        [0.5, 0.25, 1.0]
    """
    return torch.linalg.inv(world_matrix(affine, affine.shape[0] - 1))


def invert_field(
    field: torch.Tensor,
    affine: torch.Tensor | np.ndarray,
    shape: Sequence[int],
    iterations: int = 40,
    tolerance: float = 1e-3,
) -> MetaTensor:
    """Invert a displacement field on another grid.

    The best-fitting affine is inverted exactly, and the rest, `r`, by the fixed-point iteration `z = z0 - r(z)` that
    starts from the inverse on a coarser grid. It converges where neighboring points change their distance by less than
    itself, the faster for a look at the step before, and with half steps up to thrice that.
    Turning and scaling an image thus costs nothing; where the field folds there is no inverse, and the iterate that
    misses least stands. What no point of the field's grid reaches is sent where the affine, and the rest at the border
    of the grid, would take it back.

    Reference: Chen et al., "A simple fixed-point approach to invert a deformation field", Medical Physics 35(1), 2008,
    https://doi.org/10.1118/1.2816107; Anderson, "Iterative procedures for nonlinear integral equations", Journal of the
    ACM 12(4), 1965, https://doi.org/10.1145/321296.321305, with a memory of one step.

    Args:
        field: a displacement field `(D, *shape)`, from fixed to moving points.
        affine: voxel indices of the moving grid, on which the inverse lives, to RAS+ millimeters.
        shape: voxels along each of its axes.
        iterations: at most so many.
        tolerance: voxels of the field by which points may miss when the iteration ends early.

    Returns:
        The displacement field `(D, *shape)` from moving to fixed points.

    Raises:
        ValueError: if a field or affine is none, or if the best-fitting affine has no inverse.

    Example:
        >>> inverse = invert_field(as_field(torch.full((2, 4, 4), 1.5), torch.eye(3)), torch.eye(3), (2, 2))
        >>> inverse.unique().tolist()
        [-1.5]
    """
    dims = len(shape)
    fixed, moving = field_affine(field), world_matrix(affine, dims)
    fit = best_affine(field)
    if not torch.linalg.det(fit[:dims, :dims]).abs() > 1e-6:
        raise ValueError("the field sends all of its grid onto a plane, a line or a point: it has no inverse.")
    undo = torch.linalg.inv(fit @ fixed)  # moving points to fixed indices, were the field its affine part alone
    start: list[torch.Tensor] = [torch.linalg.inv(fit)]
    if max(shape) > 2 * _COARSE:
        steps = torch.diag(torch.tensor([*[_COARSE] * dims, 1.0], dtype=torch.float64))
        start = [invert_field(field, moving @ steps, [-(-n // _COARSE) for n in shape], iterations, tolerance)]
    begin, ddf = _prepared(start, dims), _values(field)

    def found(index: torch.Tensor, _: tuple[slice, ...]) -> torch.Tensor:
        points = apply_affine(moving, index)
        first = apply_affine(torch.linalg.inv(fixed), _move(points, begin))
        at = _fixed_point(ddf, undo @ fixed, first, apply_affine(undo, points), iterations, tolerance)
        return apply_affine(torch.linalg.inv(moving) @ fixed, at)

    return as_field(mapped_indices(shape, found), moving)


def invert_transform(
    transform: Sequence[torch.Tensor], affine: torch.Tensor | np.ndarray, shape: Sequence[int]
) -> list[torch.Tensor]:
    """Invert a transform: affines exactly, all else as one field on a grid.

    Args:
        transform: the steps, first to last.
        affine: voxel indices of the grid where the inverse starts, that of the moving image, to RAS+ millimeters.
        shape: voxels along each of its axes.

    Returns:
        One step: an affine if all steps are affines, else a displacement field on that grid.

    Raises:
        ValueError: if there is no step, or no inverse.

    Example:
        >>> double = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
        >>> invert_transform([double, double], torch.eye(3), (4, 4))[0].diagonal().tolist()
        [0.25, 0.25, 1.0]
    """
    dims = len(shape)
    before = torch.eye(dims + 1, dtype=torch.float64)
    for step in transform:
        if step.dim() == 2:
            before = world_matrix(step, dims) @ before
        else:
            # The grid of the first field, seen from where the transform starts, is where the whole of it is known.
            grid = torch.linalg.inv(before) @ field_affine(step)
            return [invert_field(sample_transform(transform, grid, step.shape[1:]), affine, shape)]
    return [affine_inverse(before)]


def _fixed_point(
    ddf: torch.Tensor, undo: torch.Tensor, start: torch.Tensor, goal: torch.Tensor, iterations: int, tolerance: float
) -> torch.Tensor:
    """Solve `z + r(z) = goal` for indices `(D, *block)`, keeping for each the `z` that misses least.

    The rest is `r(z) = undo(z + ddf(z)) - z`, and outside the grid that of its border.
    """
    column = [len(goal), -1] + [1] * (len(goal) - 1)
    end = torch.tensor(ddf.shape[1:], dtype=goal.dtype).reshape(column) - 1
    found, todo = torch.empty_like(start).flatten(1), torch.arange(start[0].numel())
    at, best, least = start, start, torch.full_like(start[0], torch.inf)
    last_step = last_miss = start
    for iteration in range(iterations):
        known = at.clamp(torch.zeros_like(end), end)
        miss = apply_affine(undo, sample(ddf, known).add_(known)).sub_(known).add_(at).sub_(goal)
        size = miss.square().sum(dim=0)
        best, least = torch.where(size < least, at, best), torch.minimum(size, least)
        going = least >= tolerance**2
        left = int(going.sum())
        if left == 0:
            break
        step = at - miss
        if iteration >= iterations // 4:
            # Full steps overshoot where the field stretches space to more than twice its size: half steps come after.
            at = step + 0.5 * miss
        elif iteration > 0:
            change = miss - last_miss
            share = (miss * change).sum(dim=0) / change.square().sum(dim=0).clamp(min=torch.finfo(goal.dtype).tiny)
            at = step - share * (step - last_step)
        else:
            at = step
        last_step, last_miss = step, miss
        if 2 * left < len(todo):  # what is left is worth cutting out
            found[:, todo] = best.flatten(1)
            todo, least = todo[going.flatten()], least[going].reshape(column[1:])
            state = (at, best, goal, last_step, last_miss)
            at, best, goal, last_step, last_miss = (part[:, going].reshape(column) for part in state)
    found[:, todo] = best.flatten(1)
    return found.reshape(start.shape)


def _prepared(transform: Sequence[torch.Tensor], dims: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return each step as its affine and, for a field, its values."""
    steps: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for step in transform:
        is_affine = step.dim() == 2 and not isinstance(step, MetaTensor)
        if (step.shape[0] - 1 if is_affine else step.dim() - 1) != dims or not (is_affine or step.shape[0] == dims):
            raise ValueError(f"expected a transform of {dims}D points, got a step of shape {list(step.shape)}.")
        steps.append((world_matrix(step, dims), None) if is_affine else (field_affine(step), _values(step)))
    return steps


def _move(points: torch.Tensor, steps: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    """Take points, `(D, *block)` or `(D, N)` that lie anywhere, RAS+ millimeters, through prepared steps."""
    dims = len(points)
    for affine, ddf in steps:
        if ddf is None:
            points = apply_affine(affine, points)
        else:
            index = apply_affine(torch.linalg.inv(affine), points)
            displacement = sample_scattered(ddf, index) if points.dim() == 2 else sample(ddf, index)
            points = points + torch.einsum("ij,j...->i...", affine[:dims, :dims], displacement)
    return points


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values alone, on the CPU."""
    return (tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor).detach().cpu()
