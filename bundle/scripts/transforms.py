"""MONAI transforms for pairs of images: normalizing, pairing, warping labels, splitting predictions, augmenting.

Items carry no batch axis: images are `(C, *shape)`. A `MetaTensor` keeps its metadata, numpy arrays become tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from .fields import compose, warp
from .synthesis import DARKEST, per_axis, shift, smooth_field

__all__ = [
    "NormalizeContent",
    "NormalizeContentd",
    "RandShiftd",
    "RandWarpPaird",
    "SplitPred",
    "SplitPredd",
    "StackPair",
    "StackPaird",
    "WarpLabel",
    "WarpLabeld",
]


def _plain(image: NdarrayOrTensor) -> torch.Tensor:
    """Return the values alone as a tensor that shares memory with the input."""
    return convert_to_tensor(image, track_meta=False)


def _with_meta(values: torch.Tensor, source: Any) -> torch.Tensor:
    """Return `values` with a copy of the metadata of `source`, as they are where `source` has none."""
    if not isinstance(source, MetaTensor) or not get_track_meta():
        return values
    return MetaTensor(values).copy_meta_from(source)


class NormalizeContent(Transform):
    """Map the content of an image to (0, 1] by percentiles of the content alone, and its background to exactly 0.

    Content is every voxel where any channel differs from `background`; channels are scaled one by one. Values are
    mapped linearly from the two percentiles (linear between order statistics) and clipped to `[0.001, 1]`, so that the
    darkest content stays apart from background. The statistics see neither the canvas nor the order of voxels:
    padding, cropping background or shifting gives bit-identical values. Where almost all content has one value, so that
    both percentiles coincide, its minimum and maximum take their place.

    Args:
        lower: percentile mapped to 0.
        upper: percentile mapped to 1.
        background: value of the background.
        constant: what to do with content of a single value: "error", or "one", which maps it to 1 (binary masks).

    Raises:
        ValueError: for percentiles not in order within 0 to 100, or another `constant`; when called, for an image
            with NaN or infinite values, without content, or with constant content if `constant` is "error".

    Example:
        >>> NormalizeContent(upper=100)(torch.tensor([[0.0, 2.0, 4.0, 6.0]])).tolist()
        [[0.0, 0.0010000000474974513, 0.5, 1.0]]
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, lower: float = 0.0, upper: float = 99.5, background: float = 0.0, constant: str = "error"
    ) -> None:
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"NormalizeContent expects 0 <= lower < upper <= 100, got {lower} and {upper}.")
        if constant not in ("error", "one"):
            raise ValueError(f"NormalizeContent expects constant 'error' or 'one', got '{constant}'.")
        self.lower, self.upper, self.background, self.constant = lower, upper, background, constant

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        """Return the normalized image, float32, of the same shape `(C, *shape)`."""
        values = _plain(img).to(torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"NormalizeContent expects finite values, got NaN or infinity in {self._describe(img)}.")
        content = (values != self.background).any(dim=0)
        if not bool(content.any()):
            raise ValueError(
                f"NormalizeContent expects content, got nothing but background {self.background} "
                f"in {self._describe(img)}."
            )
        result = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        for channel, target in zip(values, result):
            target[content] = self._scale(channel[content], img).float()
        return _with_meta(result, img)

    def _scale(self, content: torch.Tensor, img: NdarrayOrTensor) -> torch.Tensor:
        """Map the content values `(N,)` of one channel, float64."""
        # Dividing first keeps the differences of huge values finite.
        content = content / content.abs().max().clamp(min=torch.finfo(content.dtype).tiny)
        ordered = content.sort().values
        low, high = self._percentile(ordered, self.lower), self._percentile(ordered, self.upper)
        if not high > low:
            low, high = ordered[0], ordered[-1]
        if not high > low:
            if self.constant == "error":
                raise ValueError(
                    f"NormalizeContent expects content that varies, got a constant channel in {self._describe(img)}; "
                    "constant='one' accepts binary masks."
                )
            return torch.ones_like(content)
        return ((content - low) / (high - low)).clamp(DARKEST, 1.0)

    @staticmethod
    def _percentile(ordered: torch.Tensor, percent: float) -> torch.Tensor:
        """Return a percentile of sorted values; `torch.quantile` refuses more than 16 million of them."""
        rank = percent / 100 * (len(ordered) - 1)
        below = int(rank)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (rank - below) * (ordered[above] - ordered[below])

    @staticmethod
    def _describe(img: NdarrayOrTensor) -> str:
        name = img.meta.get("filename_or_obj") if isinstance(img, MetaTensor) else None
        return f"'{name}'" if name else f"an image of shape {list(img.shape)}"


class NormalizeContentd(MapTransform):
    """Dictionary version of `NormalizeContent`.

    Args:
        keys: images `(C, *shape)` to normalize, each on its own.
        lower: percentile mapped to 0.
        upper: percentile mapped to 1.
        background: value of the background.
        constant: "error" or "one", for content of a single value.
        allow_missing_keys: skip keys that are not there.
    """

    backend = NormalizeContent.backend

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 0.0,
        upper: float = 99.5,
        background: float = 0.0,
        constant: str = "error",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalize = NormalizeContent(lower, upper, background, constant)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with every key normalized."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.normalize(item[key])
        return item


class StackPair(Transform):
    """Stack two images of one grid into the one tensor that a host passes to the network.

    Raises:
        ValueError: when called, if shapes or channels differ.

    Example:
        >>> StackPair()(torch.zeros(1, 4, 4), torch.ones(1, 4, 4)).shape
        torch.Size([2, 4, 4])
    """

    backend = [TransformBackends.TORCH]

    def __call__(  # type: ignore[override]  # takes two images
        self, moving: NdarrayOrTensor, fixed: NdarrayOrTensor
    ) -> torch.Tensor:
        """Return `(2C, *shape)`, moving channels first, with the metadata of the fixed image, where the ddf lives."""
        if moving.shape != fixed.shape:
            raise ValueError(
                f"StackPair expects two images of one shape and channel count, got moving {list(moving.shape)} "
                f"and fixed {list(fixed.shape)}; pad or resample them first."
            )
        return _with_meta(torch.cat([_plain(moving), _plain(fixed)]), fixed)


class StackPaird(Transform):
    """Dictionary version of `StackPair`; writes the pair as network input and as the loss's `label`.

    Args:
        moving_key: the moving image `(C, *shape)`.
        fixed_key: the fixed image `(C, *shape)`, whose metadata the pair carries.
        image_key: where the pair `(2C, *shape)` goes.
        label_key: where the same tensor goes once more, or None.
    """

    backend = StackPair.backend

    def __init__(
        self,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        image_key: str = "image",
        label_key: str | None = "label",
    ) -> None:
        self.moving_key, self.fixed_key, self.image_key, self.label_key = moving_key, fixed_key, image_key, label_key
        self.stack = StackPair()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the pair added."""
        item = dict(data)
        item[self.image_key] = self.stack(item[self.moving_key], item[self.fixed_key])
        if self.label_key is not None:
            item[self.label_key] = item[self.image_key]
        return item


class SplitPred(Transform):
    """Split a network's prediction into the ddf and the moved image.

    Args:
        spatial_dims: D; needed only for predictions with a batch axis, else taken from the number of axes.

    Raises:
        ValueError: when called, for a tensor that has neither D + 1 nor D + 2 axes, or no channel beyond the ddf's.

    Example:
        >>> ddf, moved = SplitPred()(torch.zeros(3, 8, 8))
        >>> ddf.shape, moved.shape
        (torch.Size([2, 8, 8]), torch.Size([1, 8, 8]))
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, spatial_dims: int | None = None) -> None:
        self.spatial_dims = spatial_dims

    def __call__(self, pred: NdarrayOrTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split `(D + C, *shape)`, or `(B, D + C, *shape)`, into `D` displacement channels (voxels) and the others."""
        values = _plain(pred)
        dims = values.dim() - 1 if self.spatial_dims is None else self.spatial_dims
        axis = values.dim() - 1 - dims
        if axis not in (0, 1) or values.shape[axis] <= dims:
            raise ValueError(
                f"SplitPred expects (D + C, *shape) with D = {dims} spatial axes, with or without a batch axis, "
                f"got {list(values.shape)}."
            )
        ddf, moved = values.split([dims, values.shape[axis] - dims], dim=axis)
        return _with_meta(ddf, pred), _with_meta(moved, pred)


class SplitPredd(Transform):
    """Dictionary version of `SplitPred`.

    Args:
        pred_key: the prediction `(D + C, *shape)`.
        ddf_key: where the ddf `(D, *shape)` goes, voxels of the fixed grid.
        moved_key: where the moved image `(C, *shape)` goes.
        spatial_dims: D; needed only for predictions with a batch axis.
    """

    backend = SplitPred.backend

    def __init__(
        self, pred_key: str = "pred", ddf_key: str = "ddf", moved_key: str = "moved", spatial_dims: int | None = None
    ) -> None:
        self.pred_key, self.ddf_key, self.moved_key = pred_key, ddf_key, moved_key
        self.split = SplitPred(spatial_dims)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with both parts added."""
        item = dict(data)
        item[self.ddf_key], item[self.moved_key] = self.split(item[self.pred_key])
        return item


class WarpLabel(Transform):
    """Warp a label map, or any image, onto the fixed grid by a predicted ddf.

    Args:
        mode: "nearest", which keeps integer types, or "linear".
        padding: what lies outside the moving grid, "zeros" or "border".

    Example:
        >>> WarpLabel()(torch.tensor([[[0, 7, 0]]]), torch.tensor([[[0.0] * 3], [[1.0] * 3]])).tolist()
        [[[7, 0, 0]]]
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, mode: str = "nearest", padding: str = "zeros") -> None:
        self.mode, self.padding = mode, padding

    def __call__(  # type: ignore[override]  # takes two arrays
        self, label: NdarrayOrTensor, ddf: NdarrayOrTensor
    ) -> torch.Tensor:
        """Return the moved label `(C, *fixed shape)`, without metadata.

        Args:
            label: `(C, *moving shape)`; the work is done on its device.
            ddf: `(D, *fixed shape)`, voxels; further channels, as of a prediction, are ignored.

        Raises:
            ValueError: if shapes do not fit.
        """
        image, field = _plain(label), _plain(ddf)
        dims = field.dim() - 1
        if field.shape[0] < dims or image.dim() != field.dim():
            raise ValueError(
                f"WarpLabel expects a label (C, *shape) and a ddf of at least D channels (D, *shape), "
                f"got {list(image.shape)} and {list(field.shape)}."
            )
        field = field[:dims].to(device=image.device, dtype=torch.float32)
        return warp(image.unsqueeze(0), field.unsqueeze(0), mode=self.mode, padding=self.padding)[0]


class WarpLabeld(MapTransform):
    """Dictionary version of `WarpLabel`.

    Args:
        keys: moving labels `(C, *moving shape)`.
        ddf: the ddf or prediction `(D or more channels, *fixed shape)`, voxels.
        output: where the moved labels go, one name per key.
        mode: "nearest" or "linear".
        padding: "zeros" or "border".
        meta_key: item whose metadata the output carries, the fixed image; where it is missing, those of the ddf.
        allow_missing_keys: skip labels that are not there.

    Raises:
        ValueError: if the names in `output` are not as many as the keys.
    """

    backend = WarpLabel.backend

    def __init__(
        self,
        keys: KeysCollection = "moving_label",
        ddf: str = "pred",
        output: KeysCollection = "moved_label",
        mode: str = "nearest",
        padding: str = "zeros",
        meta_key: str | None = "fixed",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output = ensure_tuple_rep(output, len(self.keys))
        if len(set(self.output)) < len(self.keys):
            raise ValueError(f"WarpLabeld expects one output name per key, got {output} for {self.keys}.")
        self.ddf, self.meta_key = ddf, meta_key
        self.warp = WarpLabel(mode, padding)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the moved labels added."""
        item = dict(data)
        meta = item.get(self.meta_key) if self.meta_key is not None else None
        source = meta if isinstance(meta, MetaTensor) else item.get(self.ddf)
        for key, output in self.key_iterator(item, self.output):
            item[output] = _with_meta(self.warp(item[key], item[self.ddf]), source)
        return item


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
