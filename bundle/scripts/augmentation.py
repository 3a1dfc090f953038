"""Random transforms that make training pairs: shifts of whole voxels, smooth warps, and images painted from label maps.

Items carry no batch axis: images are `(C, *shape)`. A `MetaTensor` keeps its metadata, numpy arrays become tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from monai.utils import TransformBackends

from .fields import compose, identity_grid, warp
from .synthesis import paint, per_axis, random_levels, shift, smooth_field
from .transforms import _plain, _with_meta

__all__ = ["RandDeformd", "RandPaintPaird", "RandShiftd", "RandWarpPaird"]


class RandShiftd(RandomizableTransform, MapTransform):
    """Move the content of images by random whole voxels, each group of keys on its own.

    Zeros come in, nothing wraps around, and content that leaves the canvas is lost: pad first. Metadata stay: content
    moves in the world, as if the patient had moved.

    Args:
        keys: groups of keys that move together, such as `[("moving", "moving_label"), ("fixed", "fixed_label")]`;
            a bare key is a group of its own.
        max_shift: largest shift along an axis, voxels, one number or one per axis.
        prob: probability that an item is shifted at all.
        allow_missing_keys: skip keys that are not there, such as labels of unlabeled subjects.

    Raises:
        ValueError: for a negative shift; when called, if `max_shift` does not match the number of axes.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: Sequence[str | Sequence[str]],
        max_shift: int | Sequence[int],
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        self.groups = [(group,) if isinstance(group, str) else tuple(group) for group in keys]
        MapTransform.__init__(self, [key for group in self.groups for key in group], allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if np.min(max_shift) < 0:
            raise ValueError(f"RandShiftd expects a max_shift of at least 0, got {max_shift}.")
        self.max_shift = max_shift

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with every group shifted."""
        item = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return item
        for group in self.groups:
            present = [key for key in group if key in item or not self.allow_missing_keys]
            if not present:
                continue
            dims = item[present[0]].ndim - 1
            offsets = [int(self.R.randint(-int(m), int(m) + 1)) for m in per_axis(self.max_shift, dims, "max_shift")]
            for key in present:
                item[key] = _with_meta(shift(_plain(item[key]), offsets), item[key])
        return item


class RandWarpPaird(Randomizable, Transform):
    """Make a pair to register from one image: moving is the image, fixed is the image under a random smooth warp.

    The warp is a coarse pass followed by finer ones, random displacements of control points joined by cubic splines,
    and optionally a constant shift of the fixed image. Content that leaves the canvas is lost: pad first.

    Reference: the synthetic retina experiment of the CARL paper, which warps vessel masks of 784 x 565 pixels with
    standard deviations of 25 and 12 pixels on 3 and 6 points an axis; the defaults are these, relative to the shorter
    side. H. Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025, arXiv:2405.16738.

    Args:
        sigma: standard deviation at the control points of each pass, as fractions of the shortest side.
        points: control points along each axis, for each pass.
        shift: how the content of the fixed image moves, voxels: a vector, or a length in a random direction, or None.
        mode: "linear" or "nearest" sampling.
        image_key: the image `(C, *shape)`.
        moving_key: where the undeformed image goes.
        fixed_key: where the deformed image goes.
        ddf_key: where the true ddf goes, `(D, *shape)`, voxels: `fixed = warp(moving, true_ddf, padding="zeros")`.

    Raises:
        ValueError: if `sigma` and `points` differ in length; when called, if the shift vector does not fit the image.

    Example:
        >>> item = RandWarpPaird().set_random_state(0)({"image": torch.rand(1, 24, 24)})
        >>> item["fixed"].shape, item["true_ddf"].shape
        (torch.Size([1, 24, 24]), torch.Size([2, 24, 24]))
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        sigma: Sequence[float] = (25 / 565, 12 / 565),
        points: Sequence[int] = (3, 6),
        shift: float | Sequence[float] | None = None,
        mode: str = "linear",
        image_key: str = "image",
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        ddf_key: str = "true_ddf",
    ) -> None:
        if len(sigma) != len(points) or len(sigma) == 0:
            raise ValueError(f"RandWarpPaird expects one sigma per number of points, got {sigma} and {points}.")
        self.sigma, self.points, self.shift, self.mode = tuple(sigma), tuple(points), shift, mode
        self._seed = 0
        self.image_key, self.moving_key, self.fixed_key, self.ddf_key = image_key, moving_key, fixed_key, ddf_key

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the next warp."""
        self._seed = int(self.R.randint(2**31))

    def _draw(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the true ddf `(1, D, *shape)`, voxels."""
        generator = np.random.default_rng(self._seed)
        dims = len(shape)
        passes = [smooth_field(shape, p, s * min(shape), generator) for s, p in zip(self.sigma, self.points)]
        if self.shift is None:
            offsets = np.zeros(dims)
        elif isinstance(self.shift, (int, float)):
            direction = generator.standard_normal(dims)
            offsets = self.shift * direction / np.linalg.norm(direction)
        else:
            offsets = np.array(per_axis(self.shift, dims, "shift"))
        # Content moves by +offsets when every point looks back by -offsets, before it is displaced by the passes.
        back = -torch.from_numpy(offsets).float().reshape([1, dims] + [1] * dims)
        ddf = back.expand(1, dims, *shape)
        for field in reversed(passes):
            ddf = compose(field, ddf)
        return ddf

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with moving, fixed and the true ddf added."""
        item = dict(data)
        image = item[self.image_key]
        values = _plain(image)
        self.randomize()
        ddf = self._draw(values.shape[1:]).to(values.device)
        fixed = warp(values.unsqueeze(0), ddf, mode=self.mode, padding="zeros")[0]
        item[self.moving_key] = _with_meta(values, image)
        item[self.fixed_key] = _with_meta(fixed, image)
        item[self.ddf_key] = ddf[0]
        return item


def _center(shape: Sequence[int]) -> torch.Tensor:
    """Return the center of a grid, `(1, D, 1, ...)`, voxels."""
    return torch.tensor([(size - 1) / 2 for size in shape]).reshape([1, len(shape)] + [1] * len(shape))


class RandDeformd(Randomizable, MapTransform):
    """Turn, scale, shear and smoothly warp each image about its center, each key on its own.

    One nearest-neighbor sampling does it all, so that label maps stay label maps. Content that leaves the canvas is
    lost: pad first. Two deformations of one image correspond voxel by voxel, and `coordinates_keys` tell how: where
    coordinates are equal, the same point of the image is seen.

    Args:
        keys: the label maps `(1, *shape)`.
        turn: standard deviation of the turn about each axis, radians.
        scale: standard deviation of the scale along each axis, without a unit; shears get `1 / sqrt(2)` of it.
        sigma: standard deviation of each pass of the smooth warp, as fractions of the shortest side.
        points: control points along each axis, for each pass.
        same: probability that the image of the first key takes the place of all others before they are deformed.
        coordinates_keys: where it goes, for each key, which point each voxel shows, `(D + 1, *shape)`: its place in the
            undeformed image, voxels from the center, then 1 in content and 0 elsewhere, or 0 if the images are not the
            same; left out, coordinates are not kept.
        allow_missing_keys: skip keys that are not there.

    Raises:
        ValueError: if `sigma` and `points` differ in length, or `coordinates_keys` and `keys` do.

    Example:
        >>> labels = {"moving": torch.ones(1, 12, 12, 12)}
        >>> RandDeformd(["moving"]).set_random_state(0)(labels)["moving"].unique().tolist()
        [0.0, 1.0]
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: Sequence[str],
        turn: float = 0.2,
        scale: float = 0.08,
        sigma: Sequence[float] = (0.05, 0.02),
        points: Sequence[int] = (4, 9),
        same: float = 0.0,
        coordinates_keys: Sequence[str] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(sigma) != len(points):
            raise ValueError(f"RandDeformd expects one sigma per number of points, got {sigma} and {points}.")
        if coordinates_keys and len(coordinates_keys) != len(self.keys):
            raise ValueError(f"RandDeformd expects one of coordinates_keys per key, got {coordinates_keys} for {keys}.")
        self.turn, self.scale, self.sigma, self.points = turn, scale, tuple(sigma), tuple(points)
        self.same, self.coordinates_keys = same, tuple(coordinates_keys)

    def _draw(self, shape: Sequence[int]) -> torch.Tensor:
        """Return a ddf `(1, D, *shape)`, voxels."""
        generator, dims = np.random.default_rng(int(self.R.randint(2**31))), len(shape)
        noise = torch.from_numpy(generator.standard_normal((2, dims, dims)))
        turn = torch.linalg.matrix_exp(self.turn * (noise[0] - noise[0].T) / 2**0.5)
        stretch = self.scale * (noise[1] + noise[1].T) / 2
        linear = turn @ (torch.eye(dims) + stretch) - torch.eye(dims)
        from_center = identity_grid(list(shape)) - _center(shape)
        ddf = torch.einsum("ij,bj...->bi...", linear.float(), from_center)
        for sigma, points in zip(self.sigma, self.points):
            ddf = ddf + smooth_field(shape, points, sigma * min(shape), generator)
        return ddf

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with every image deformed."""
        item = dict(data)
        present = list(self.key_iterator(item))
        same = self.same > 0 and bool(self.R.random() < self.same)
        places = dict(zip(self.keys, self.coordinates_keys))
        for key in present:
            source = data[present[0] if same else key]
            values = _plain(source)
            ddf = self._draw(values.shape[1:])
            warped = warp(values.unsqueeze(0).float(), ddf, mode="nearest", padding="zeros")[0]
            item[key] = _with_meta(warped.to(values.dtype), source)
            if self.coordinates_keys:
                known = (warped != 0).float() * same
                place = identity_grid(list(values.shape[1:])) + ddf - _center(values.shape[1:])
                item[places[key]] = _with_meta(torch.cat([place[0], known]), source)
        return item


class RandPaintPaird(Randomizable, Transform):
    """Paint the images of a pair from its label maps, with random contrast, and say what to compare where.

    Beside each image stands what a loss can compare whatever the contrast: a painting of its labels in the same levels
    on both sides, without noise, and the masks of some labels, the same on both sides. Joined to the image, a
    `PairNetwork(carried_channels=1 + masks)` moves them along and sees the image alone.

    Reference: networks that learn from images synthesized from label maps need no image of the kind they are used on.
    M. Hoffmann et al., "SynthMorph", IEEE TMI 2022, doi:10.1109/TMI.2021.3116879.

    Args:
        groups: brightness group, 1, 2, ..., of the labels 1, 2, ...: labels of one group, such as left and right, look
            alike. 0 makes a label background.
        same_contrast: probability that both images are painted in the same levels.
        masks: how many labels to draw.
        labels: labels to draw from are 1 to this number.
        keys: moving and fixed: label maps `(1, *shape)` that become images `(1, *shape)`.
        carried_keys: where the painting and the masks of each go, `(1 + masks, *shape)`.

    Raises:
        ValueError: if `masks` exceeds `labels`, or `labels` the number of groups.

    Example:
        >>> item = {key: torch.randint(0, 3, (1, 12, 12)) for key in ("moving", "fixed")}
        >>> item = RandPaintPaird(groups=[1, 2], masks=1, labels=2).set_random_state(0)(item)
        >>> item["moving"].shape, item["moving_carried"].shape
        (torch.Size([1, 12, 12]), torch.Size([2, 12, 12]))
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        groups: Sequence[int],
        same_contrast: float = 0.5,
        masks: int = 8,
        labels: int = 8,
        keys: Sequence[str] = ("moving", "fixed"),
        carried_keys: Sequence[str] = ("moving_carried", "fixed_carried"),
    ) -> None:
        if not 0 <= masks <= labels <= len(groups):
            raise ValueError(
                f"RandPaintPaird expects masks <= labels <= groups, got {masks}, {labels} and {len(groups)} groups."
            )
        self.groups = torch.tensor([0, *groups])
        self.same_contrast, self.masks, self.labels, self.keys = same_contrast, masks, labels, tuple(keys)
        self.carried_keys = tuple(carried_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with both label maps painted."""
        item = dict(data)
        generator = np.random.default_rng(int(self.R.randint(2**31)))
        count = int(self.groups.max())
        chosen = torch.from_numpy(1 + generator.permutation(self.labels)[: self.masks])
        reference = random_levels(count, generator)
        table = torch.from_numpy(np.concatenate([[0.0], reference])).float()
        alike = generator.random() < self.same_contrast
        for key, carried_key in zip(self.keys, self.carried_keys):
            source = item[key]
            labels = _plain(source).long()
            groups = self.groups[labels]
            image = paint(groups, generator, reference if alike else random_levels(count, generator))
            masks = (labels == chosen.reshape([-1] + [1] * (labels.dim() - 1))).float()
            item[key] = _with_meta(image, source)
            item[carried_key] = _with_meta(torch.cat([table[groups], masks]), source)
        return item
