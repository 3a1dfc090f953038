"""Large grids, worked on block by block.

All positions are float64. Of what is sampled only the part that a block reads is converted to float64: memory stays
that of the result, and what is temporary stays in the processor's cache. Threads take blocks, not parts of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch

from .fields import identity_grid, warp
from .threads import in_threads

__all__ = [
    "block_indices",
    "blocks",
    "for_blocks",
    "is_finite",
    "mapped_indices",
    "sample",
    "sample_scattered",
    "spaced_voxels",
]

_VOXELS = 2**15  # of a block
_READ = 2**20  # voxels that are converted for a block: one that needs more, such as for a stray point, is split
_STRAY = 64  # voxels to convert for a point, from which on it costs less to gather the neighbors of each


def blocks(shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """Cut a grid into blocks about as long as wide.

    Args:
        shape: voxels along each of the D axes of the grid.

    Returns:
        Where each block is in a tensor `(C, *shape)`.

    Example:
        >>> blocks((40, 40, 1))
        [(slice(None, None, None), slice(0, 40, None), slice(0, 40, None), slice(0, 1, None))]
    """
    edges, room = list(shape), float(_VOXELS)
    for axes_left, axis in zip(range(len(shape), 0, -1), sorted(range(len(shape)), key=lambda axis: shape[axis])):
        edges[axis] = max(1, min(shape[axis], round(room ** (1 / axes_left))))
        room /= edges[axis]
    cuts = [[slice(at, min(at + edge, n)) for at in range(0, n, edge)] for n, edge in zip(shape, edges)]
    return [(slice(None), *block) for block in product(*cuts)]


def block_indices(where: tuple[slice, ...]) -> torch.Tensor:
    """Return the indices of the voxels of a block.

    Args:
        where: one of `blocks`.

    Returns:
        `(D, *block shape)`, float64.

    Example:
        >>> block_indices((slice(None), slice(2, 4), slice(0, 1)))[0].tolist()
        [[2.0], [3.0]]
    """
    index = identity_grid([cut.stop - cut.start for cut in where[1:]], torch.float64)[0]
    for along, cut in zip(index, where[1:]):
        along.add_(cut.start)
    return index


def for_blocks(shape: Sequence[int], work: Callable[[tuple[slice, ...]], None]) -> None:
    """Do work on every block of a grid, on as many threads as torch has.

    Args:
        shape: voxels along each of the D axes of the grid.
        work: takes one of `blocks`, in any order; what it writes belongs to that block alone.
    """
    for _ in in_threads(work, blocks(shape)):
        pass


def is_finite(values: torch.Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, without another tensor of its size.

    Args:
        values: any shape, real numbers.

    Returns:
        True if all values are finite.

    Example:
        >>> is_finite(torch.tensor([0.0, torch.inf])), is_finite(torch.ones(2, 3))
        (False, True)
    """
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())


def mapped_indices(
    shape: Sequence[int], mapped: Callable[[torch.Tensor, tuple[slice, ...]], torch.Tensor]
) -> torch.Tensor:
    """Return by how much a function moves the voxel indices of a grid.

    Args:
        shape: voxels along each of the D axes of the grid.
        mapped: takes the indices of a block, see `block_indices`, and one of `blocks`; returns where the indices go,
            `(D, *block shape)`, float64.

    Returns:
        `(D, *shape)`, float32, voxels.

    Example:
        >>> mapped_indices((2, 3), lambda index, where: 2 * index)[1].tolist()
        [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    """
    ddf = torch.empty([len(shape), *shape], dtype=torch.float32)

    def work(where: tuple[slice, ...]) -> None:
        index = block_indices(where)
        ddf[where] = mapped(index, where) - index

    for_blocks(shape, work)
    return ddf


def sample(
    values: torch.Tensor, position: torch.Tensor, mode: str = "linear", padding: str = "border", outside: float = 0.0
) -> torch.Tensor:
    """Read an image at the positions of a block, which lie close to each other.

    Args:
        values: `(C, *shape)`, any type.
        position: `(D, *block shape)`, float64, indices into the image.
        mode: as for `equireg.fields.warp`.
        padding: as for `equireg.fields.warp`, where "zeros" means the value `outside`.
        outside: the background of the image.

    Returns:
        `(C, *block shape)`, float64.

    Example:
        >>> sample(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[0.0, 0.0]], [[0.5, 1.5]]]).double()).tolist()
        [[[1.5, 3.0]]]
    """
    if mode == "nearest":
        position = position.round()  # here, so that no block decides otherwise than its neighbor
    end = torch.tensor(values.shape[1:]) - 1
    low, high = position.flatten(1).aminmax(dim=1)
    first = low.floor().nan_to_num(0.0).clamp(min=0).minimum(end)
    last = high.floor().add(1).nan_to_num(torch.inf).clamp(min=0).minimum(end)
    read = tuple(slice(int(start), int(stop) + 1) for start, stop in zip(first, last))
    box, points = math.prod(cut.stop - cut.start for cut in read), position[0].numel()
    if box > _STRAY * points and mode == "linear" and padding == "border":
        return sample_scattered(values, position.flatten(1)).reshape([-1, *position.shape[1:]])
    if points > 1 and box > _READ:
        axis = max(range(1, position.dim()), key=lambda axis: position.shape[axis])
        halves = position.split(-(-position.shape[axis] // 2), dim=axis)
        return torch.cat([sample(values, half, mode, padding, outside) for half in halves], dim=axis)
    crop = values[(slice(None),) + read].to(torch.float64)
    if outside:
        crop = crop - outside
    local = identity_grid(list(position.shape[1:]), position.dtype)[0]
    ddf = position - local.add_(first.reshape([-1] + [1] * (position.dim() - 1)))
    found = warp(crop.unsqueeze(0), ddf.unsqueeze(0), mode, padding)[0]
    return found.add_(outside) if outside else found


def sample_scattered(values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Read an image at positions anywhere; it is continued by its border.

    Args:
        values: `(C, *shape)`, any type.
        position: `(D, N)`, float64, indices into the image.

    Returns:
        `(C, N)`, float64.

    Example:
        >>> sample_scattered(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[0.0], [1.5]]).double()).tolist()
        [[3.0]]
    """
    dims = len(position)
    end = torch.tensor(values.shape[1:]).reshape([dims] + [1] * (dims + 1)) - 1
    first = position.floor().nan_to_num(0.0).reshape([dims, -1] + [1] * dims).clamp(min=0).minimum(end)
    corners = identity_grid([2] * dims, torch.int64).transpose(0, 1)  # (D, 1, 2, 2, 2)
    around = tuple(torch.minimum(first.long() + corners, end))
    cells = values[(slice(None),) + around].transpose(0, 1)  # (N, C, 2, 2, 2)
    ddf = position.reshape(first.shape) - first
    return warp(cells.to(torch.float64), ddf.transpose(0, 1)).flatten(1).T


def spaced_voxels(shape: Sequence[int], mask: torch.Tensor | None, most: int) -> torch.Tensor:
    """Choose voxels evenly, in the order of the array, to stand for all.

    Args:
        shape: voxels along each axis.
        mask: `(*shape)` or `(1, *shape)`, the voxels to choose from, nonzero; all if left out.
        most: how many at most.

    Returns:
        `(N,)`, int64, indices into the flattened grid.

    Example:
        >>> spaced_voxels((2, 4), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]]), 3).tolist()
        [0, 3, 7]
    """
    if mask is None:
        size = math.prod(shape)
        return torch.arange(0, size, max(1, -(-size // most)))
    flat = mask.as_subclass(torch.Tensor).flatten()
    step = max(1, -(-int(flat.count_nonzero()) // most))
    chosen, passed = [torch.empty(0, dtype=torch.int64)], 0
    for start in range(0, len(flat), _VOXELS):
        hits = flat[start : start + _VOXELS].nonzero()[:, 0]
        chosen.append(hits[-passed % step :: step] + start)
        passed += len(hits)
    return torch.cat(chosen)
