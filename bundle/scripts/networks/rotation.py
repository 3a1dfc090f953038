"""Grid rotations: the turns of an array that map voxels to voxels, and what features averaged over them gain.

A turn of a `D`-dimensional array is a permutation of its axes and a set of axes to reverse. It moves content about the
center of the array, `(n - 1) / 2` along each axis: point `x` goes to `y` with `y_i = x_perm[i]`, or `n - 1 - x_perm[i]`
where axis `i` is reversed. Turns are lists of integers, so that what uses them traces, scripts and exports.
"""

from itertools import permutations, product
from typing import List

import torch

__all__ = ["GROUPS", "rotation_group", "turn", "turn_back", "turn_matrix"]

GROUPS = ("none", "pi", "grid")


def turn_matrix(perm: List[int], signs: List[int]) -> torch.Tensor:
    """Return the rotation matrix of a turn.

    Args:
        perm: which old axis becomes each new axis.
        signs: for each new axis 1, or -1 where it is reversed.

    Returns:
        `(D, D)`, float64: points relative to the center of the array are multiplied by it from the left.

    Example:
        >>> turn_matrix([1, 0], [1, -1]).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    return torch.diag(torch.tensor(signs, dtype=torch.float64)) @ torch.eye(len(perm), dtype=torch.float64)[perm]


def rotation_group(spatial_dims: int, name: str) -> List[List[List[int]]]:
    """List the turns of a finite rotation group, the identity first.

    Args:
        spatial_dims: 2 or 3.
        name: "none" (the identity alone), "pi" (half turns about the axes: 2 in 2D, 4 in 3D) or "grid" (all rotations
            of the grid: 4 in 2D, 24 in 3D).

    Returns:
        For each turn `[perm, signs]`, see `turn_matrix`.

    Raises:
        ValueError: for another name.

    Example:
        >>> [len(rotation_group(dims, name)) for name in GROUPS for dims in (2, 3)]
        [1, 1, 2, 4, 4, 24]
    """
    if name not in GROUPS:
        raise ValueError(f"a rotation group must be one of {', '.join(GROUPS)}, got {name!r}.")
    axes = list(range(spatial_dims))
    orders = [list(order) for order in permutations(axes)] if name == "grid" else [axes]
    signs = [list(sign) for sign in product([1, -1], repeat=spatial_dims)] if name != "none" else [[1] * spatial_dims]
    # A determinant of -1 would be a reflection: anatomy has left and right.
    return [[order, sign] for order in orders for sign in signs if _determinant(order, sign) > 0]


def _determinant(perm: List[int], signs: List[int]) -> int:
    """Return the determinant of a turn's matrix, by counting inversions: no tensor, so also on the meta device."""
    inversions = sum(perm[i] > perm[j] for j in range(len(perm)) for i in range(j))
    return (-1) ** (inversions + signs.count(-1))


def _reversed(signs: List[int]) -> List[int]:
    """Return the axes of `(B, C, *shape)` that a turn reverses."""
    axes: List[int] = []
    for k, sign in enumerate(signs):  # TorchScript knows no conditions in comprehensions
        if sign < 0:
            axes.append(2 + k)
    return axes


def turn(image: torch.Tensor, perm: List[int], signs: List[int]) -> torch.Tensor:
    """Turn an image about the center of its array.

    Args:
        image: `(B, C, *shape)`.
        perm: which old spatial axis becomes each new one.
        signs: for each new axis 1, or -1 where it is reversed.

    Returns:
        `(B, C, *turned shape)`.

    Example:
        >>> turn(torch.arange(6.0).reshape(1, 1, 2, 3), [1, 0], [1, -1])[0, 0].tolist()
        [[3.0, 0.0], [4.0, 1.0], [5.0, 2.0]]
    """
    return image.permute([0, 1] + [2 + k for k in perm]).flip(_reversed(signs))


def turn_back(image: torch.Tensor, perm: List[int], signs: List[int]) -> torch.Tensor:
    """Undo `turn` with the same arguments.

    Args:
        image: `(B, C, *turned shape)`.
        perm: as for `turn`.
        signs: as for `turn`.

    Returns:
        `(B, C, *shape)`.

    Example:
        >>> image = torch.rand(1, 1, 2, 3)
        >>> torch.equal(turn_back(turn(image, [1, 0], [1, -1]), [1, 0], [1, -1]), image)
        True
    """
    order = [0, 1] + [2 + perm.index(k) for k in range(len(perm))]
    return image.flip(_reversed(signs)).permute(order)
