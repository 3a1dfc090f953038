"""MONAI transforms for pairs of images: normalizing, matching grids, pairing, and what becomes of predictions.

Items carry no batch axis: images are `(C, *shape)`. A `MetaTensor` keeps its metadata, numpy arrays become tensors.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import MapTransform, SpatialResample, Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from .blocks import blocks, is_finite
from .fields import warp
from .lists import result_name
from .spaces import covering_grid, origin_offset, same_axes
from .synthesis import DARKEST
from .world import field_affine, invert_field, map_points, warp_image

__all__ = [
    "InvertFieldd",
    "MatchAxesd",
    "NormalizeContent",
    "NormalizeContentd",
    "RestorePredd",
    "SplitPred",
    "SplitPredd",
    "StackPair",
    "StackPaird",
    "WarpImaged",
    "WarpLabel",
    "WarpLabeld",
    "WarpPointsd",
]


def _plain(image: NdarrayOrTensor) -> torch.Tensor:
    """Return the values alone as a tensor that shares memory with the input."""
    return convert_to_tensor(image, track_meta=False)


def _with_meta(values: torch.Tensor, source: Any) -> torch.Tensor:
    """Return `values` with a copy of the metadata of `source`, as they are where `source` has none."""
    if not isinstance(source, MetaTensor) or not get_track_meta():
        return values
    return MetaTensor(values).copy_meta_from(source)


def _gathered(channel: torch.Tensor, content: torch.Tensor, parts: Sequence[tuple[slice, ...]]) -> torch.Tensor:
    """Copy the content values of a channel `(1, *shape)` into one tensor `(N,)`, part by part, in no special order."""
    values, filled = channel.new_empty(int(content.count_nonzero())), 0
    for where in parts:
        chosen = channel[where][content[where]]
        values[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
    return values


class NormalizeContent(Transform):
    """Map the content of an image to (0, 1] by percentiles of the content alone, and its background to exactly 0.

    Content is every voxel where any channel differs from `background`; channels are scaled one by one. Values are
    mapped linearly from the two percentiles (linear between order statistics) and clipped to `[0.001, 1]`, so that the
    darkest content stays apart from background. The statistics see neither the canvas nor the order of voxels:
    padding, cropping background or shifting gives bit-identical values. Where almost all content has one value, so that
    both percentiles coincide, its minimum and maximum take their place; content of a single value on a background (a
    binary mask) becomes 1.

    Args:
        lower: percentile mapped to 0.
        upper: percentile mapped to 1.
        background: value of the background.

    Raises:
        ValueError: for percentiles not in order within 0 to 100; when called, for an image with NaN or infinite values,
            without content, or without anything but content of a single value.

    Example:
        >>> NormalizeContent(upper=100)(torch.tensor([[0.0, 2.0, 4.0, 6.0]])).tolist()
        [[0.0, 0.0010000000474974513, 0.5, 1.0]]
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, lower: float = 0.0, upper: float = 99.5, background: float = 0.0) -> None:
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"NormalizeContent expects 0 <= lower < upper <= 100, got {lower} and {upper}.")
        self.lower, self.upper, self.background = lower, upper, background

    def __call__(self, img: NdarrayOrTensor, content: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize an image.

        Args:
            img: `(C, *shape)`.
            content: `(*shape)` or `(1, *shape)`, boolean, what is content whatever its values; all that differs from
                the background if left out.

        Returns:
            float32, of the shape of `img`.
        """
        values = _plain(img)
        values = values if values.dtype == torch.float32 else values.to(torch.float64)
        if not is_finite(values):
            raise ValueError(f"NormalizeContent expects finite values, got NaN or infinity in {self._describe(img)}.")
        content = values != self.background if content is None else content.reshape(1, *values.shape[1:])
        content = content.any(dim=0, keepdim=True)
        if not bool(content.any()):
            raise ValueError(
                f"NormalizeContent expects content, got nothing but background {self.background} "
                f"in {self._describe(img)}."
            )
        result = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        parts = blocks(values.shape[1:])
        for channel, target in zip(values.split(1), result.split(1)):
            low, high, unit = self._limits(_gathered(channel, content, parts), img)
            for where in parts:
                scaled = channel[where].to(torch.float64).div(unit).sub_(low).div_(high - low).clamp_(DARKEST, 1.0)
                target[where] = scaled.masked_fill_(~content[where], 0.0)
        return _with_meta(result, img)

    def _limits(self, content: torch.Tensor, img: NdarrayOrTensor) -> tuple[float, float, float]:
        """Return what becomes 0 and what becomes 1 of content values `(N,)`, a copy, and the unit of both."""
        ordered = content.numpy(force=True)
        ranks = [percent / 100 * (len(ordered) - 1) for percent in (self.lower, 0, self.upper, 100)]
        around = [(int(rank), min(int(rank) + 1, len(ordered) - 1)) for rank in ranks]
        ordered.partition(sorted({rank for pair in around for rank in pair}))  # puts these where sorting would
        # Dividing first keeps the differences of huge values finite.
        unit = max(abs(float(ordered[0])), abs(float(ordered[-1])), torch.finfo(torch.float64).tiny)
        known = [[float(ordered[rank]) / unit for rank in pair] for pair in around]
        low, least, high, most = (
            below + (rank - int(rank)) * (above - below) for rank, (below, above) in zip(ranks, known)
        )
        if not high > low:
            low, high = least, most
        if not high > low:
            if len(ordered) == math.prod(img.shape[1:]):
                raise ValueError(
                    f"NormalizeContent expects an image that varies, got a constant one in {self._describe(img)}."
                )
            low = high - 1.0  # content of a single value becomes 1
        return low, high, unit

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
        allow_missing_keys: skip keys that are not there.
    """

    backend = NormalizeContent.backend

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 0.0,
        upper: float = 99.5,
        background: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalize = NormalizeContent(lower, upper, background)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with every key normalized."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.normalize(item[key])
        return item


def _affine(data: Mapping[Hashable, Any], key: str | Hashable, user: str) -> torch.Tensor:
    """Return the affine of an image of an item, which places its voxels in the world."""
    image = data[key]
    if not isinstance(image, MetaTensor):
        raise ValueError(
            f"{user} expects data['{key}'] to be a MetaTensor, whose affine places it in the world, "
            f"got {type(image).__name__}."
        )
    return image.affine


class MatchAxesd(MapTransform):
    """Resample images to the direction and spacing of a reference image, and to nothing else of its grid.

    Each image gets the grid `equireg.spaces.covering_grid`, which covers all of it: nothing is cropped, and shape and
    origin stay its own. An image that has these axes already stays bit-identical. New voxels outside the image are 0,
    so background must be 0, too. Finer images are sampled, not averaged: smooth them first where that matters.

    Args:
        keys: images or labels `(C, *shape)`, `MetaTensor`s.
        reference_key: the image whose axes count, a `MetaTensor` of as many axes; only its affine is used.
        mode: "bilinear" or, for labels, "nearest", which keeps integer types; one for all keys or one per key.
            "bilinear" makes integer images float32.
        allow_missing_keys: skip keys that are not there.

    Raises:
        ValueError: for another mode; when called, for images without an affine, with another number of axes than the
            reference, or with an affine that `equireg.spaces.same_axes` refuses.

    Example:
        >>> moving = MetaTensor(torch.ones(1, 5, 5), affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
        >>> fixed = MetaTensor(torch.ones(1, 3, 3), affine=torch.eye(4))
        >>> MatchAxesd()({"moving": moving, "fixed": fixed})["moving"].shape
        torch.Size([1, 9, 5])
    """

    backend = SpatialResample.backend

    def __init__(
        self,
        keys: KeysCollection = "moving",
        reference_key: str = "fixed",
        mode: str | Sequence[str] = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        if not set(self.mode) <= {"bilinear", "nearest"}:
            raise ValueError(f"MatchAxesd expects mode 'bilinear' or 'nearest', got {mode!r}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with every key on axes of the reference."""
        item = dict(data)
        reference = _affine(item, self.reference_key, "MatchAxesd")
        dims = item[self.reference_key].ndim - 1
        for key, mode in self.key_iterator(item, self.mode):
            affine = _affine(item, key, "MatchAxesd")
            if item[key].ndim - 1 != dims:
                raise ValueError(
                    f"MatchAxesd expects images of as many axes as data['{self.reference_key}'] of shape "
                    f"{list(item[self.reference_key].shape)}, got data['{key}'] of shape {list(item[key].shape)}."
                )
            if not same_axes(affine, reference, dims):
                item[key] = self._resample(item[key], reference, mode)
        return item

    @staticmethod
    def _resample(image: MetaTensor, reference: torch.Tensor, mode: str) -> torch.Tensor:
        """Resample an image to the grid that covers it along the axes of the reference."""
        affine, shape = covering_grid(image.affine, image.shape[1:], reference, image.ndim - 1)
        if shape == tuple(image.shape[1:]):
            # SpatialResample skips grids of one size whose steps differ by less than 0.001, which adds up to 0.3 voxels
            # over 300. A last plane of background makes it go to work.
            shape = (shape[0] + 1, *shape[1:])
        matched = SpatialResample(mode=mode, padding_mode="zeros")(image, dst_affine=affine, spatial_size=shape)
        keeps_type = image.is_floating_point() or mode == "nearest"
        return matched.to(image.dtype) if keeps_type else matched


class StackPair(Transform):
    """Stack two images of one grid into the one tensor that a host passes to the network.

    Args:
        pad: pad images of different shapes with zeros, at the end of each axis, to a common shape. Voxel indices and
            affines keep their meaning.

    Raises:
        ValueError: when called, if channels differ, or if shapes differ and `pad` is False.

    Example:
        >>> StackPair(pad=True)(torch.zeros(1, 4, 6), torch.ones(1, 5, 4)).shape
        torch.Size([2, 5, 6])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, pad: bool = False) -> None:
        self.pad = pad

    def __call__(  # type: ignore[override]  # takes two images
        self, moving: NdarrayOrTensor, fixed: NdarrayOrTensor
    ) -> torch.Tensor:
        """Return `(2C, *shape)`, moving channels first, with the metadata of the fixed image, where the ddf lives."""
        fits = moving.shape == fixed.shape
        if self.pad:
            fits = moving.ndim == fixed.ndim and moving.shape[0] == fixed.shape[0]
        if not fits:
            raise ValueError(
                f"StackPair expects two images of one {'' if self.pad else 'shape and '}channel count, got moving "
                f"{list(moving.shape)} and fixed {list(fixed.shape)}; pad or resample them first."
            )
        shape = [max(sizes) for sizes in zip(moving.shape[1:], fixed.shape[1:])]
        return _with_meta(torch.cat([_pad_end(_plain(image), shape) for image in (moving, fixed)]), fixed)


def _pad_end(image: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Pad an image `(C, *smaller shape)` with zeros at the end of each axis."""
    missing = [new - old for new, old in zip(shape, image.shape[1:])]
    return torch.nn.functional.pad(image, [n for after in reversed(missing) for n in (0, after)])


class StackPaird(Transform):
    """Dictionary version of `StackPair`; writes the pair as network input and as the loss's `label`.

    Args:
        moving_key: the moving image `(C, *shape)`.
        fixed_key: the fixed image `(C, *shape)`, whose metadata the pair carries.
        image_key: where the pair `(2C, *shape)` goes.
        label_key: where the same tensor goes once more, or None.
        pad: pad images of different shapes with zeros at the end of each axis to a common shape.
    """

    backend = StackPair.backend

    def __init__(
        self,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        image_key: str = "image",
        label_key: str | None = "label",
        pad: bool = False,
    ) -> None:
        self.moving_key, self.fixed_key, self.image_key, self.label_key = moving_key, fixed_key, image_key, label_key
        self.stack = StackPair(pad)

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


class RestorePredd(Transform):
    """Turn the prediction for a pair that `MatchAxesd` and `StackPaird` prepared into images and a field in the world.

    The network counts in voxels of the stacked arrays: the point at fixed index `x` matches the point at moving index
    `x + u(x)`, wherever the two arrays lie in the world. Moving voxel 0 lies at fixed index `o`
    (`equireg.spaces.origin_offset`), so the displacement between the world positions, in fixed voxels, is `u + o`.
    That is what `SaveTransformd` writes; `u` alone is what warps arrays.

    Args:
        pred_key: the prediction `(D + C, *padded shape)`: ddf in voxels, then moved, which is not used.
        moving_key: the moving image in its own intensities, `(C', *moving shape)`, with background 0, on the grid that
            the network saw: voxel for voxel the image that was stacked.
        fixed_key: the fixed image `(C, *fixed shape)` as it was stacked; its grid and metadata go to the results.
        ddf_key: where the displacement between world positions goes: `(D, *fixed shape)`, voxels of the fixed grid.
        moved_key: where the moved image goes: `(C', *fixed shape)`, float32 for integer images.
        label_key: a moving label map with the axes of the moving image, or None; its origin and shape are its own.
        moved_label_key: where the moved label goes: `(1, *fixed shape)`, sampled by nearest neighbor.

    Raises:
        ValueError: when called, if an image has no affine, if directions or spacings differ, or if the prediction does
            not cover the fixed image.

    Example:
        >>> moving = MetaTensor(torch.tensor([[[0, 0, 9]]]), affine=torch.eye(4))
        >>> fixed = MetaTensor(torch.zeros(1, 1, 2), affine=torch.eye(4))
        >>> pred = torch.stack([torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3)])
        >>> item = RestorePredd()({"pred": pred, "moving_raw": moving, "fixed": fixed})
        >>> item["moved"].tolist(), item["ddf"].shape
        ([[[0.0, 9.0]]], torch.Size([2, 1, 2]))
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        pred_key: str = "pred",
        moving_key: str = "moving_raw",
        fixed_key: str = "fixed",
        ddf_key: str = "ddf",
        moved_key: str = "moved",
        label_key: str | None = None,
        moved_label_key: str = "moved_label",
    ) -> None:
        self.pred_key, self.moving_key, self.fixed_key = pred_key, moving_key, fixed_key
        self.ddf_key, self.moved_key = ddf_key, moved_key
        self.label_key, self.moved_label_key = label_key, moved_label_key
        self.split = SplitPred()
        self.warp_image, self.warp_label = WarpLabel("linear"), WarpLabel("nearest")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the ddf, the moved image and, if asked for, the moved label added."""
        item = dict(data)
        moving_affine = _affine(item, self.moving_key, "RestorePredd")
        fixed_affine = _affine(item, self.fixed_key, "RestorePredd")
        moving, fixed = _plain(item[self.moving_key]), item[self.fixed_key]
        ddf = self._crop(_plain(self.split(item[self.pred_key])[0]).float(), fixed.shape[1:])
        offset = origin_offset(moving_affine, fixed_affine, ddf.shape[0])
        item[self.ddf_key] = _with_meta(ddf + _as_field(offset, ddf), fixed)
        image = moving if moving.is_floating_point() else moving.float()
        item[self.moved_key] = _with_meta(self.warp_image(image, ddf), fixed)
        if self.label_key is not None:
            # Zero where the label lies on the grid of the moving image.
            shift = origin_offset(moving_affine, _affine(item, self.label_key, "RestorePredd"), ddf.shape[0])
            moved = self.warp_label(item[self.label_key], ddf + _as_field(shift, ddf))
            item[self.moved_label_key] = _with_meta(moved, fixed)
        return item

    def _crop(self, ddf: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Take what lies on the fixed image from a ddf that may go on beyond its end."""
        if len(shape) != ddf.dim() - 1 or any(have < want for have, want in zip(ddf.shape[1:], shape)):
            raise ValueError(
                f"RestorePredd expects a prediction of at least the shape of data['{self.fixed_key}'], "
                f"{list(shape)}, got {list(ddf.shape[1:])}."
            )
        return ddf[(slice(None),) + tuple(slice(size) for size in shape)]


def _as_field(vector: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
    """Give a vector `(D,)` the axes, type and device of a ddf `(D, *shape)`."""
    return vector.to(ddf).reshape([-1] + [1] * (ddf.dim() - 1))


class WarpImaged(MapTransform):
    """Bring images through a displacement field onto its grid, wherever they lie in the world.

    Args:
        keys: images or labels `(C, *moving shape)`, `MetaTensor`s on any grid.
        field_key: the displacement field `(D, *fixed shape)`, from points of its grid to points of the images; see
            `equireg.world`.
        output: where the results go, one name per key.
        mode: "linear", which makes integer images float32, or "nearest"; one for all keys or one per key.
        background: the value outside an image.
        meta_key: item whose metadata the results carry, the image on whose grid the field lies; if it is not there, the
            results carry their affine alone.
        name_keys: items whose file names make the name that the results bear, such as `("moving", "fixed")`; none if
            left out.
        allow_missing_keys: skip images that are not there.

    Raises:
        ValueError: if the names in `output` are not as many as the keys; when called, as `equireg.world.warp_image`.

    Example:
        >>> image = MetaTensor(torch.tensor([[[1.0, 2.0, 3.0]]]), affine=torch.eye(4))
        >>> field = MetaTensor(torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]), affine=torch.eye(4))
        >>> WarpImaged()({"moving": image, "fixed_to_moving": field})["moved"].tolist()
        [[[2.0, 3.0]]]
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: KeysCollection = "moving",
        field_key: str = "fixed_to_moving",
        output: KeysCollection = "moved",
        mode: str | Sequence[str] = "linear",
        background: float = 0.0,
        meta_key: str | None = "fixed",
        name_keys: Sequence[str] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output, self.mode = ensure_tuple_rep(output, len(self.keys)), ensure_tuple_rep(mode, len(self.keys))
        if len(set(self.output)) < len(self.keys):
            raise ValueError(f"WarpImaged expects one output name per key, got {output} for {self.keys}.")
        self.field_key, self.background = field_key, background
        self.meta_key, self.name_keys = meta_key, tuple(name_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the results added."""
        item = dict(data)
        for key, output, mode in self.key_iterator(item, self.output, self.mode):
            image = item[key] if item[key].is_floating_point() or mode == "nearest" else item[key].float()
            moved = warp_image(image, item[self.field_key], mode, self.background)
            like = item.get(self.meta_key) if self.meta_key is not None else None
            item[output] = moved if like is None else MetaTensor(_plain(moved)).copy_meta_from(like)
            item[output].affine = moved.affine
            if self.name_keys:
                files = [item[name].meta.get("filename_or_obj") for name in self.name_keys]
                item[output].meta["filename_or_obj"] = f"{result_name(files)}.nii.gz"
        return item


class WarpPointsd(MapTransform):
    """Take points through a displacement field.

    Args:
        keys: points `(N, D)`, RAS+ millimeters, in the space where the field starts: fixed points for a field from
            fixed to moving points.
        field_key: the displacement field, see `equireg.world`.
        output: where the results `(N, D)`, float64, RAS+ millimeters, go, one name per key.
        allow_missing_keys: skip points that are not there.

    Raises:
        ValueError: if the names in `output` are not as many as the keys; when called, as `equireg.world.map_points`.

    Example:
        >>> field = MetaTensor(torch.ones(2, 4, 4), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
        >>> WarpPointsd()({"fixed_points": torch.zeros(1, 2), "fixed_to_moving": field})["mapped_points"].tolist()
        [[2.0, 3.0]]
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: KeysCollection = "fixed_points",
        field_key: str = "fixed_to_moving",
        output: KeysCollection = "mapped_points",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output = ensure_tuple_rep(output, len(self.keys))
        if len(set(self.output)) < len(self.keys):
            raise ValueError(f"WarpPointsd expects one output name per key, got {output} for {self.keys}.")
        self.field_key = field_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the results added."""
        item = dict(data)
        for key, output in self.key_iterator(item, self.output):
            item[output] = map_points(convert_to_tensor(item[key], track_meta=False), [item[self.field_key]])
        return item


class InvertFieldd(Transform):
    """Invert a displacement field on the grid of an image.

    Args:
        field_key: the displacement field, see `equireg.world`.
        grid_key: the image on whose grid the inverse lives: the moving one for a field from fixed to moving points.
        output_key: where the inverse `(D, *moving shape)` goes.

    Raises:
        ValueError: when called, as `equireg.world.invert_field`.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 4, 4), affine=torch.eye(4))
        >>> field = MetaTensor(torch.ones(2, 4, 4), affine=torch.eye(4))
        >>> InvertFieldd()({"fixed_to_moving": field, "moving": image})["moving_to_fixed"].unique().tolist()
        [-1.0]
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, field_key: str = "fixed_to_moving", grid_key: str = "moving", output_key: str = "moving_to_fixed"
    ) -> None:
        self.field_key, self.grid_key, self.output_key = field_key, grid_key, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the inverse added."""
        item = dict(data)
        image = item[self.grid_key]
        item[self.output_key] = invert_field(item[self.field_key], field_affine(image), image.shape[1:])
        return item
