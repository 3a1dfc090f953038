"""Planes on which a pair of images is looked at: where they cut the fixed grid, which way is up, what lies on them.

Positions on a plane are millimeters to the right and upwards of the voxel that the picture shows at the lower left:
those of the fixed grid's own axes, so that the fixed image, the moved one and the ddf are drawn as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
import torch

from .fields import identity_grid, jacobian_determinant, warp

__all__ = [
    "GrayImage",
    "View",
    "content_box",
    "fold_share",
    "folds",
    "rigid_part",
    "shared_limits",
    "square_affine",
    "views",
]

_PLANES = (("axial", 0, 1, 2), ("coronal", 0, 2, 1), ("sagittal", 1, 2, 0))  # name; axes of RAS right, up, through
_LETTERS = ("LR", "PA", "IS")  # at the low and at the high end of each axis of RAS
_DARKEST = 0.07  # of content, so that it stays apart from background
_SAMPLES = 200_000  # voxels that percentiles are taken from, about
# A peak of dark values holds this share of the content in this share of its range; black is then this percentile of
# the rest.
_PEAK_SHARE, _PEAK_WIDTH, _PEAK_PERCENT = 0.05, 0.08, 5.0
_SLAB = 8  # layers of a ddf whose folds are counted at a time


@dataclass(frozen=True)
class View:
    """A plane through the fixed grid, along two of its axes, as a picture shows it.

    Args:
        name: "axial", "coronal" or "sagittal", whichever is nearest; empty in 2D.
        axes: array axes that run to the right and upwards.
        signs: -1 where the index falls in that direction, else 1.
        through: array axis that is cut, None in 2D.
        index: the slice.
        shape: voxels of the fixed grid along every array axis.
        spacing: millimeters between them.
        letters: what lies at the left, right, bottom and top; empty in 2D, where a file does not say.
        ends: letters at the low and at the high index of the axis that is cut; empty in 2D.
    """

    name: str
    axes: tuple[int, int]
    signs: tuple[int, int]
    through: int | None
    index: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    letters: str
    ends: str

    @property
    def step(self) -> tuple[float, float]:
        """Millimeters between voxels to the right and upwards."""
        return self.spacing[self.axes[0]], self.spacing[self.axes[1]]

    def layers(self, values: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """Return some layers of an array `(..., *spatial)` on both sides of the plane; all of a 2D one."""
        return values if self.through is None else values.narrow(self.through - len(self.shape), start, length)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """Return the slice `(..., right, up)` of an array `(..., *spatial)` on the fixed grid."""
        if self.through is not None:
            values = values.select(self.through - len(self.shape), self.index)
        return self.turn(values)

    def turn(self, plane: torch.Tensor) -> torch.Tensor:
        """Return a slice `(..., *two array axes)` as it is drawn, `(..., right, up)`."""
        if self.axes[0] > self.axes[1]:
            plane = plane.transpose(-1, -2)
        return plane.flip([axis for axis, sign in zip((-2, -1), self.signs) if sign < 0])

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where the voxels of a slice lie, to the right and upwards, millimeters."""
        right, up = (step * np.arange(self.shape[axis]) for step, axis in zip(self.step, self.axes))
        return right, up

    def on_plane(self, indices: np.ndarray) -> np.ndarray:
        """Return where fixed voxel indices `(D, N)` lie to the right and upwards, `(2, N)` millimeters."""
        return np.stack(
            [
                step * (indices[axis] if sign > 0 else self.shape[axis] - 1 - indices[axis])
                for axis, sign, step in zip(self.axes, self.signs, self.step)
            ]
        )

    def points(self, right: np.ndarray, up: np.ndarray, index: float | None = None) -> np.ndarray:
        """Return the fixed voxel indices `(D, right, up)` of a raster on the plane, or on a parallel one."""
        points = np.empty((len(self.shape), len(right), len(up)))
        if self.through is not None:
            points[self.through] = self.index if index is None else index
        for axis, sign, step, at in zip(self.axes, self.signs, self.step, (right[:, None], up[None])):
            points[axis] = at / step if sign > 0 else self.shape[axis] - 1 - at / step
        return points


@dataclass(frozen=True)
class GrayImage:
    """An image with a way to look at it from the fixed grid.

    Args:
        values: the channel shown, `(*shape)`.
        background: its value where there is nothing.
        limits: values shown as the darkest and brightest content.
        from_fixed: fixed voxel indices to those of the image, `(D + 1, D + 1)`.
        box: lowest and highest index of the content, `(2, D)`.
    """

    values: torch.Tensor
    background: float
    limits: tuple[float, float]
    from_fixed: np.ndarray
    box: np.ndarray

    @classmethod
    def of(
        cls, image: torch.Tensor, background: float, from_fixed: np.ndarray, like: GrayImage | None = None
    ) -> GrayImage:
        """Look at the first channel of an image `(C, *shape)`, as bright as another image if one is given."""
        values = image.detach().cpu().as_subclass(torch.Tensor)
        box = content_box((values != background).any(dim=0))
        limits = _limits(values[0], background, box) if like is None else like.limits
        return cls(values[0], background, limits, from_fixed, box)

    def corners(self) -> np.ndarray:
        """Return the corners of the box around the content, half a voxel wider, in fixed indices, `(D, 2**D)`."""
        edges = np.stack([self.box[0] - 0.5, self.box[1] + 0.5])
        dims = edges.shape[1]
        choice = np.indices((2,) * dims).reshape(dims, -1)
        fixed_from = np.linalg.inv(self.from_fixed)
        return fixed_from[:dims, :dims] @ edges[choice, np.arange(dims)[:, None]] + fixed_from[:dims, dims:]

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return the brightness, 0 to 1, at fixed voxel indices `(D, right, up)`; 0 outside the image's voxels."""
        dims = len(points)
        own = np.einsum("ij,j...->i...", self.from_fixed[:dims, :dims], points)
        own += self.from_fixed[:dims, dims].reshape(-1, 1, 1)
        last = np.array(self.values.shape).reshape(-1, 1, 1) - 1
        nearest = np.clip(own, 0, last)
        inside = (np.abs(own - nearest) <= 0.5 + 1e-6).all(axis=0)
        if not inside.any():
            return np.zeros(inside.shape)
        # Only the voxels around the points are scaled: of an upright slice, two layers.
        low = np.floor(nearest[:, inside].min(axis=1)).astype(int)
        high = np.ceil(nearest[:, inside].max(axis=1)).astype(int)
        part = self.values[tuple(slice(a, b + 1) for a, b in zip(low, high))]
        shape = [*inside.shape, *[1] * (dims - 2)]
        wanted = torch.from_numpy(nearest - low.reshape(-1, 1, 1)).reshape(1, dims, *shape)
        ddf = wanted - identity_grid(shape, dtype=torch.float64)
        sampled = warp(self._brightness(part)[None, None], ddf.float(), padding="border")
        return np.where(inside, sampled.reshape(inside.shape).numpy(), 0.0)

    def _brightness(self, values: torch.Tensor) -> torch.Tensor:
        low, high = self.limits
        gray = (values.double() - low).div_(high - low).clamp_(0, 1).float()
        return gray.mul_(1 - _DARKEST).add_(_DARKEST).mul_(values != self.background)


def views(affine: np.ndarray, shape: Sequence[int], box: np.ndarray) -> list[View]:
    """Choose the planes to look at: along the fixed grid's axes, through the center of the content.

    A plane on which the grid is a single row of voxels is left out. 3D planes are drawn with the patient's right,
    anterior and superior side to the right or at the top; 2D images as ITK's coordinates have it, x to the right and y
    down, which is how a photograph is stored.

    Args:
        affine: fixed voxel indices to RAS+ millimeters, `(D + 1, D + 1)`.
        shape: of the fixed grid.
        box: lowest and highest index of its content, `(2, D)`.

    Returns:
        One to three planes.

    Example:
        >>> affine = np.diag([-1.0, 1.0, 2.0, 1.0])  # the first axis runs from right to left
        >>> [(view.name, view.letters, view.signs) for view in views(affine, (9, 9, 9), np.array([[0] * 3, [8] * 3]))]
        [('axial', 'LRPA', (-1, 1)), ('coronal', 'LRIS', (-1, 1)), ('sagittal', 'PAIS', (1, 1))]
    """
    dims = len(shape)
    spacing = tuple(np.linalg.norm(affine[:dims, :dims], axis=0).tolist())
    nearest = nib.io_orientation(affine)
    array_axis = [int(np.flatnonzero(nearest[:, 0] == world)[0]) for world in range(dims)]
    sign = [int(nearest[axis, 1]) for axis in array_axis]
    sizes = tuple(shape)
    if dims == 2:
        return [View("", (array_axis[0], array_axis[1]), (-sign[0], sign[1]), None, 0, sizes, spacing, "", "")]
    found = []
    for name, right, up, through in _PLANES:
        axis = array_axis[through]
        found.append(
            View(
                name,
                (array_axis[right], array_axis[up]),
                (sign[right], sign[up]),
                axis,
                int(box[:, axis].sum()) // 2,
                sizes,
                spacing,
                _LETTERS[right] + _LETTERS[up],
                _LETTERS[through][:: sign[through]],
            )
        )
    wide = [view for view in found if min(shape[axis] for axis in view.axes) > 1]
    return wide or [max(found, key=lambda view: shape[view.axes[0]] * shape[view.axes[1]])]


def content_box(content: torch.Tensor) -> np.ndarray:
    """Return the lowest and highest index of content along each axis; all indices if there is none.

    Args:
        content: `(*shape)`, True where there is something.

    Returns:
        `(2, D)`.

    Example:
        >>> content_box(torch.tensor([[False, True, True], [False, False, False]])).tolist()
        [[0, 1], [0, 2]]
    """
    values, bounds = content.numpy(), []
    for axis, size in enumerate(values.shape):
        # One axis at a time: the list of all voxels with content would take more memory than the image.
        hits = np.flatnonzero(values.any(axis=tuple(other for other in range(values.ndim) if other != axis)))
        bounds.append((hits[0], hits[-1]) if hits.size else (0, size - 1))
    return np.array(bounds).T


def square_affine(affine: torch.Tensor | np.ndarray, dims: int) -> np.ndarray:
    """Return the part of a `(4, 4)` affine that counts for a grid of D axes, `(D + 1, D + 1)` float64."""
    given = torch.as_tensor(affine, dtype=torch.float64, device="cpu").numpy()
    square = np.eye(dims + 1)
    square[:dims, :dims], square[:dims, dims] = given[:dims, :dims], given[:dims, -1]
    return square


def fold_share(ddf: torch.Tensor) -> float:
    """Return the share of folded cells of a ddf `(D, *shape)`, as `equireg.metrics.folding_fraction`, in less memory.

    Example:
        >>> fold_share(torch.zeros(2, 40, 5))
        0.0
    """
    folded, cells = 0, 0
    for start in range(0, max(ddf.shape[1] - 1, 1), _SLAB):
        found = folds(ddf[:, start : start + _SLAB + 1])
        folded, cells = folded + int(found.sum()), cells + found.numel()
    return folded / cells


def folds(ddf: torch.Tensor) -> torch.Tensor:
    """Tell which cells of a ddf `(D, *shape)` fold; an undefined one counts as folded."""
    return ~(jacobian_determinant(ddf.unsqueeze(0), scheme="forward")[0, 0] > 0)


def rigid_part(ddf: torch.Tensor, spacing: Sequence[float], box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a rotation and a shift to a ddf over a box: `x + ddf(x)` is about `rotation @ x + shift`.

    Least squares over some hundred thousand points at most.

    Args:
        ddf: `(D, *shape)`, voxels.
        spacing: millimeters between voxels along each axis.
        box: lowest and highest index, `(2, D)`.

    Returns:
        The rotation `(D, D)` and the shift `(D,)`, for positions in millimeters along the array axes.

    Reference: Kabsch, "A solution for the best rotation to relate two sets of vectors", Acta Crystallographica A32,
    1976, https://doi.org/10.1107/S0567739476001873.

    Example:
        >>> rotation, shift = rigid_part(torch.full((2, 5, 5), 3.0), [2.0, 1.0], np.array([[0, 0], [4, 4]]))
        >>> rotation.round(9).tolist(), shift.round(9).tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [6.0, 3.0])
    """
    slices = _thinned(box)
    step = np.array(spacing)[:, None]
    start = np.stack([axis.ravel() for axis in np.meshgrid(*(np.r_[s] for s in slices), indexing="ij")]) * step
    end = start + ddf[(slice(None),) + slices].double().flatten(1).numpy() * step
    center, target = start.mean(axis=1), end.mean(axis=1)
    left, _, right = np.linalg.svd((end - target[:, None]) @ (start - center[:, None]).T)
    proper = np.ones(len(step))
    proper[-1] = np.linalg.det(left @ right)
    rotation = (left * proper) @ right
    return rotation, target - rotation @ center


def _thinned(box: np.ndarray) -> tuple[slice, ...]:
    """Return slices that pick evenly spaced voxels of a box, about `_SAMPLES` at most."""
    sizes = (box[1] - box[0] + 1).astype(float)
    stride = max(1, int(np.ceil((sizes.prod() / _SAMPLES) ** (1 / len(sizes)))))
    return tuple(slice(int(low), int(high) + 1, stride) for low, high in box.T)


def shared_limits(a: GrayImage, b: GrayImage) -> tuple[GrayImage, GrayImage]:
    """Give two images one range of grays if their values have one scale, such as Hounsfield units.

    That is taken to be so where both ranges reach below zero and overlap by more than half. Otherwise tissue of one
    density would look different wherever the images hold different shares of it.
    """
    (low, high), (other_low, other_high) = a.limits, b.limits
    overlap = min(high, other_high) - max(low, other_low)
    if max(low, other_low) >= 0 or overlap <= 0.5 * (max(high, other_high) - min(low, other_low)):
        return a, b
    limits = (low + other_low) / 2, (high + other_high) / 2
    return replace(a, limits=limits), replace(b, limits=limits)


def _limits(values: torch.Tensor, background: float, box: np.ndarray) -> tuple[float, float]:
    """Return the values to show as darkest and brightest, from percentiles of the content."""
    some = values[_thinned(box)].double().numpy()
    content = some[some != background]
    if content.size == 0:  # content so sparse that every picked voxel missed it, or none
        content = values[values != background].double().numpy()
    if content.size == 0:
        return background, background + 1
    low, high = np.percentile(content, [0.5, 99.5]).tolist()
    # Air is often many values close to the lowest, such as -1005 to -990 on a background of -1024: what is not air
    # deserves the range of grays.
    above = content[content > low + _PEAK_WIDTH * (high - low)]
    if low < high and above.size < (1 - _PEAK_SHARE) * content.size:
        low = np.percentile(above, _PEAK_PERCENT).item()
    if low >= high:
        low, high = float(content.min()), float(content.max())
    return (low, high) if low < high else (low - 1, high)
