"""Random transforms that make training pairs: shifts of whole voxels, and smooth warps with a known answer.

Items carry no batch axis: images are `(C, *shape)`. A `MetaTensor` keeps its metadata, numpy arrays become tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from monai.utils import TransformBackends

from .fields import compose, warp
from .synthesis import per_axis, shift, smooth_field
from .transforms import _plain, _with_meta

__all__ = ["RandShiftd", "RandWarpPaird"]


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
