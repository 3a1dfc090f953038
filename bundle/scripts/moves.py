"""Moves of image content: what equivariance is tested with.

A move acts on an image and on points: content at point `p` of the old canvas lies at `to_new(p)` of the new one, and
`to_old` is the way back. Points are voxel indices. Translations and grid rotations map voxels to voxels and copy
values; other moves interpolate linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .fields import identity_grid, warp
from .synthesis import per_axis, smooth_field

__all__ = ["AffineMove", "Move", "WarpMove", "read_at", "rotation", "smooth_warp", "still", "translation", "turn_angle"]


def read_at(ddf: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Read a ddf at points, linearly, its border continued.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        points: `(B, D, *other shape)`, voxels of the ddf's grid. Either may have a batch of 1 for all of the other's.

    Returns:
        `(B, D, *other shape)`, in the type of the points.

    Example:
        >>> read_at(identity_grid([4, 4]), torch.tensor([0.5, 2.0]).reshape(1, 2, 1, 1)).flatten().round(decimals=4)
        tensor([0.5000, 2.0000])
    """
    grid = identity_grid(list(points.shape[2:]), points.dtype, points.device)
    batch = max(ddf.shape[0], points.shape[0])
    offset = (points - grid).expand(batch, *points.shape[1:])
    return warp(ddf.to(points).expand(batch, *ddf.shape[1:]), offset)


def _resample(image: torch.Tensor, ddf: torch.Tensor, exact: bool) -> torch.Tensor:
    """Warp an image; where voxels fall between voxels, background stays exactly 0 and content keeps its extent."""
    ddf = ddf.to(image.device).expand(image.shape[0], *ddf.shape[1:])
    if exact or not image.is_floating_point():
        return warp(image, ddf, mode="nearest", padding="zeros")
    content = warp((image != 0).any(dim=1, keepdim=True).to(image.dtype), ddf, padding="zeros")
    return torch.where(content >= 0.5, warp(image, ddf, padding="zeros"), image.new_zeros(()))


@dataclass(frozen=True)
class AffineMove:
    """Content at point `p` goes to `matrix @ p + offset`, on a canvas of its own shape.

    Args:
        matrix: `(D, D)`, float64, invertible.
        offset: `(D,)`, float64, voxels.
        shape: shape of the new canvas; content that does not fit is lost.

    Example:
        >>> move = AffineMove(torch.eye(2).double(), torch.tensor([1.0, 0.0]).double(), (3, 2))
        >>> move.image(torch.ones(1, 1, 1, 1))[0, 0].tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """

    matrix: torch.Tensor
    offset: torch.Tensor
    shape: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether voxels go to voxels, so that values are copied and never interpolated."""
        turns = torch.equal(self.matrix.abs().sum(dim=0), torch.ones_like(self.offset))
        return turns and torch.equal(self.matrix, self.matrix.round()) and torch.equal(self.offset, self.offset.round())

    def to_new(self, points: torch.Tensor) -> torch.Tensor:
        """Move points `(B, D, *any)`, voxels of the old canvas, to the new one."""
        return _affine(points, self.matrix, self.offset)

    def to_old(self, points: torch.Tensor) -> torch.Tensor:
        """Bring points `(B, D, *any)`, voxels of the new canvas, back to the old one."""
        back = torch.linalg.inv(self.matrix)
        back = back.round() if self.exact else back
        return _affine(points, back, -back @ self.offset)

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """Move an image or label map `(B, C, *old shape)`; integers are taken from the nearest voxel."""
        grid = identity_grid(list(self.shape), torch.float64)
        return _resample(image, self.to_old(grid) - grid, self.exact)


@dataclass(frozen=True)
class WarpMove:
    """The new image reads the old one where a smooth ddf points: `new(x) = old(x + ddf(x))`, on the same canvas.

    Args:
        ddf: `(1, D, *shape)`, float64, voxels, without folds; continued outside its canvas by its border values.
        iterations: how often the fixed-point iteration of `to_new` runs, see `fields.invert`.
    """

    ddf: torch.Tensor
    iterations: int = 50

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canvas."""
        return tuple(self.ddf.shape[2:])

    @property
    def exact(self) -> bool:
        """Whether voxels go to voxels: they do not."""
        return False

    def to_new(self, points: torch.Tensor) -> torch.Tensor:
        """Move points `(B, D, *any)`, voxels, along with the content."""
        new = points
        for _ in range(self.iterations):
            new = points - read_at(self.ddf, new)
        return new

    def to_old(self, points: torch.Tensor) -> torch.Tensor:
        """Bring points `(B, D, *any)`, voxels, back."""
        return points + read_at(self.ddf, points)

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """Warp an image or label map `(B, C, *shape)`; integers are taken from the nearest voxel."""
        return _resample(image, self.ddf, exact=False)


Move = AffineMove | WarpMove


def _affine(points: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Apply `matrix @ p + offset` to points `(B, D, *any)`."""
    matrix, offset = matrix.to(points), offset.to(points)
    return torch.einsum("ij,bj...->bi...", matrix, points) + offset.reshape([1, -1] + [1] * (points.dim() - 2))


def still(shape: Sequence[int]) -> AffineMove:
    """Return the move that leaves content where it is, on a canvas of `shape`."""
    return translation([0] * len(shape), shape)


def translation(by: Sequence[float], canvas: Sequence[int]) -> AffineMove:
    """Move content by a vector.

    Args:
        by: voxels along each axis; whole numbers copy, others interpolate.
        canvas: shape of the new canvas: it may be larger (padded at its end) or smaller (cropped) than the old one.

    Returns:
        The move.

    Example:
        >>> translation([1, 0], (3, 1)).image(torch.tensor([[[[5.0], [6.0]]]])).flatten().tolist()
        [0.0, 5.0, 6.0]
    """
    dims = len(canvas)
    offset = torch.tensor(per_axis(by, dims, "by"), dtype=torch.float64)
    return AffineMove(torch.eye(dims, dtype=torch.float64), offset, tuple(canvas))


def rotation(matrix: torch.Tensor, shape: Sequence[int], canvas: Sequence[int] | None = None) -> AffineMove:
    """Turn content about the center `(n - 1) / 2` of its canvas.

    Args:
        matrix: `(D, D)`, a rotation of voxel indices.
        shape: shape of the old canvas.
        canvas: shape of the new one, whose center the content turns about; if left out, that of the turned array for a
            grid rotation, else the old one.

    Returns:
        The move.

    Example:
        >>> quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> rotation(quarter, (2, 3)).image(torch.arange(6.0).reshape(1, 1, 2, 3))[0, 0].tolist()
        [[3.0, 0.0], [4.0, 1.0], [5.0, 2.0]]
    """
    matrix = matrix.double()
    old = torch.tensor([float(n) for n in shape], dtype=torch.float64)
    if canvas is None:
        turned = (matrix.abs() @ old).round().int().tolist()
        canvas = turned if torch.equal(matrix, matrix.round()) else shape
    new = torch.tensor([float(n) for n in canvas], dtype=torch.float64)
    return AffineMove(matrix, (new - 1) / 2 - matrix @ ((old - 1) / 2), tuple(canvas))


def turn_angle(degrees: float, dims: int, axes: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Return the rotation matrix of a turn by an angle in the plane of two array axes.

    Args:
        degrees: the angle, from the first axis towards the second.
        dims: number of axes.
        axes: the plane.

    Returns:
        `(D, D)`, float64; exact for multiples of 90 degrees.

    Example:
        >>> turn_angle(90, 2).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    if degrees % 90 == 0:
        sine, cosine = round(sine), round(cosine)
    matrix = torch.eye(dims, dtype=torch.float64)
    a, b = axes
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cosine, -sine, sine, cosine
    return matrix + 0.0  # no negative zeros


def smooth_warp(shape: Sequence[int], sigma: float, generator: np.random.Generator, points: int = 4) -> WarpMove:
    """Draw a random smooth warp.

    Args:
        shape: shape of the canvas.
        sigma: standard deviation of the displacement at the control points, voxels; well below the distance between
            control points, or the warp folds.
        generator: source of the randomness.
        points: control points along each axis.

    Returns:
        The move.

    Example:
        >>> move = smooth_warp((16, 16), 0.5, np.random.default_rng(0))
        >>> points = identity_grid([16, 16], torch.float64)[..., 4:12, 4:12]
        >>> bool((move.to_new(move.to_old(points)) - points).abs().max() < 1e-9)
        True
    """
    return WarpMove(smooth_field(shape, points, sigma, generator).double())
