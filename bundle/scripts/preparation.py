"""From two images on any grids to what a network sees, and from its answer back to the fixed image's grid.

A network wants two images of one spacing and direction, normalized, their background exactly 0. `network_image` makes
one: it takes the content of an image and nothing else, so that whatever lies around it, and wherever it lies on its
canvas, what the network sees is bit by bit the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import gaussian_1d
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor

from .blocks import mapped_indices
from .networks.active import place_affinely
from .spaces import (
    apply_affine,
    covering_grid,
    four_by_four,
    nearest_order,
    reordered,
    reordered_affine,
    same_axes,
    world_matrix,
)
from .synthesis import DARKEST
from .transforms import NormalizeContent, StackPair
from .world import as_field, field_affine, resample, sample_transform

__all__ = ["PreparePaird", "RestorePaird", "network_axes", "network_image", "restored_field"]

_SAME_SPACING = 0.01  # relative difference below which a grid is taken as it is
_CONTENT_SHARE = 0.1  # of a resampled voxel that makes it content: thin vessels stay, smoothing does not spread out
_LARGEST = 2**25  # voxels of a network's image: more take hours and all memory
_BAND = 32  # rows of a banded matrix that are multiplied at a time


def network_axes(
    affine: torch.Tensor | np.ndarray, dims: int, spacing: Sequence[float] | float | None = None
) -> torch.Tensor:
    """Return the axes of the grid on which a network sees a fixed image.

    They have the image's own directions, permuted and flipped to be nearest to RAS+, and the network's spacing.

    Args:
        affine: voxel indices of the fixed image to RAS+ millimeters.
        dims: D, the number of its spatial axes.
        spacing: of the network, millimeters, along each axis of that grid or along all; None, or a spacing within 1 %
            of the image's own, keeps the image's own.

    Returns:
        `(D + 1, D + 1)`, float64: an affine with these axes and voxel 0 at the origin of the world.

    Raises:
        ValueError: for an affine that `spaces` refuses, or a spacing that is not D positive numbers.

    Example:
        >>> network_axes(torch.diag(torch.tensor([-2.0, 1.0, 3.0, 1.0])), dims=3, spacing=1.5).diagonal().tolist()
        [1.5, 1.5, 1.5, 1.0]
    """
    matrix = world_matrix(affine, dims)
    axes, signs = nearest_order(matrix, torch.eye(dims + 1), dims)
    steps = matrix[:dims, axes] * torch.tensor(signs, dtype=torch.float64)
    if spacing is not None:
        own, wanted = steps.norm(dim=0), _positive(spacing, dims)
        steps = steps / own * torch.where((own / wanted - 1).abs() < _SAME_SPACING, own, wanted)
    matrix[:dims, :dims], matrix[:dims, dims] = steps, 0.0
    return matrix


def _positive(spacing: Sequence[float] | float, dims: int) -> torch.Tensor:
    """Return a spacing along each axis, `(D)`, float64."""
    try:
        given = torch.as_tensor(spacing, dtype=torch.float64)
        numbers = given.expand(dims) if given.dim() == 0 else given  # one number is for all axes, a list of one is not
    except (TypeError, ValueError, RuntimeError, OverflowError):  # what is no number, or not one for each axis
        numbers = torch.full((dims,), math.nan)
    if numbers.shape != (dims,) or not bool((numbers > 0).all() and numbers.isfinite().all()):
        raise ValueError(f"the network's spacing should be {dims} positive numbers, got {spacing!r}.")
    return numbers


def network_image(
    image: MetaTensor, axes_affine: torch.Tensor, content: torch.Tensor | None = None, background: float = 0.0
) -> MetaTensor:
    """Bring the content of an image onto a network's grid: cropped, turned, resampled and normalized.

    Intensities are normalized on the image's own voxels, by percentiles of the content. If the image has the axes
    wanted, up to their order and direction, no value is interpolated; else the grid covers the content, starting at its
    corner, and a voxel of which at least a tenth is content becomes content, the rest of it counted as 0. Where the new
    grid is coarser, the content is smoothed first, so that a voxel stands for all that it covers.

    Reference: the width of the smoothing is that of Cardoso et al., "Scale factor point spread function matching:
    beyond aliasing in image resampling", MICCAI 2015, https://doi.org/10.1007/978-3-319-24571-3_81.

    Args:
        image: `(C, *shape)`, a `MetaTensor` in intensities of any unit.
        axes_affine: `(D + 1, D + 1)`, an affine with the axes of the grid wanted, see `network_axes`; its origin does
            not count.
        content: `(1, *shape)`, boolean, what belongs to the object; all that differs from `background` if left out.
        background: value of the background.

    Returns:
        `(C, *new shape)`, float32, content in (0, 1], background 0, with its affine.

    Raises:
        ValueError: if the image has no affine, no content, a single value everywhere, or values that are not finite, or
            if the new grid would have more than 2^25 voxels.

    Example:
        >>> image = MetaTensor(torch.arange(6.0).reshape(1, 2, 3), affine=torch.eye(4))
        >>> network_image(image, torch.eye(3)).shape
        torch.Size([1, 2, 3])
    """
    dims = image.dim() - 1
    values = _plain(image)
    inside = (values != background).any(dim=0, keepdim=True) if content is None else _plain(content).bool()
    if not bool(inside.any()):
        raise ValueError(f"there is nothing to register in {_name(image)}: all of it is background ({background:g}).")
    box = _box(inside[0])
    corner = torch.tensor([part.start for part in box], dtype=torch.float64)
    affine = field_affine(image)
    affine[:dims, dims] += affine[:dims, :dims] @ corner
    values, inside = values[(slice(None),) + box], inside[(slice(None),) + box]
    values = _plain(NormalizeContent(background=background)(MetaTensor(values, meta=image.meta), inside))

    axes, signs = nearest_order(affine, axes_affine, dims)
    affine = reordered_affine(affine, values.shape[1:], axes, signs)
    values = reordered(values, axes, signs)
    seen = _placed(values, affine, image)
    if same_axes(affine, axes_affine, dims):
        return _of_size(seen, seen.shape[1:])
    return _resampled(seen, reordered(inside, axes, signs), axes_affine)


def _resampled(image: MetaTensor, inside: torch.Tensor, axes_affine: torch.Tensor) -> MetaTensor:
    """Smooth and resample normalized content `(C, *shape)`, given where it is, `(1, *shape)`, onto a covering grid."""
    dims = image.dim() - 1
    affine, shape = covering_grid(field_affine(image), image.shape[1:], axes_affine, dims)
    _of_size(image, shape)
    coarser = (axes_affine[:dims, :dims].norm(dim=0)) / field_affine(image)[:dims, :dims].norm(dim=0)
    # Of a filter ten times as wide as the image less than `_CONTENT_SHARE` lies inside; it may be too large to make.
    if bool((coarser > 10 * torch.tensor(image.shape[1:])).any()):
        raise _nothing_left(image)
    sigmas = (coarser**2 - 1).clamp(min=0).sqrt() / (2 * math.sqrt(2 * math.log(2)))
    both = torch.empty(image.shape[0] + 1, *image.shape[1:], device=image.device)
    both[:-1], both[-1:] = _plain(image), inside
    if bool((sigmas > 0).any()):
        both = _smoothed(both, sigmas.tolist())
    sampled = resample(MetaTensor(both, affine=image.affine), affine, shape)
    values, share = _plain(sampled[:-1]), _plain(sampled[-1:])
    values = torch.where(share >= _CONTENT_SHARE, values.clamp(DARKEST, 1.0), 0.0)
    if not bool(values.any()):
        raise _nothing_left(image)
    return _placed(values, affine, image)


def _nothing_left(image: MetaTensor) -> ValueError:
    return ValueError(f"nothing is left of {_name(image)} at the network's spacing: it should be smaller.")


def _box(inside: torch.Tensor) -> tuple[slice, ...]:
    """Return the smallest box that holds all that is true in `(*shape)`."""
    box = []
    for axis in range(inside.dim()):
        found = inside.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _smoothed(maps: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Smooth `(C, *shape)` by Gaussians of so many voxels, with zeros outside.

    It is what MONAI's `GaussianFilter` does. Products with pieces of banded matrices are ten times as fast as its
    convolutions.
    """
    for axis, sigma in enumerate(sigmas, start=1):
        if sigma <= 0:
            continue
        kernel = gaussian_1d(torch.tensor(sigma), truncated=4.0)
        reach, size, rest = len(kernel) // 2, maps.shape[axis], maps.shape[axis + 1 :].numel()
        smooth = torch.empty_like(maps, memory_format=torch.contiguous_format)
        # The last axis becomes one large matrix in place of many vectors.
        rows, result = (m.reshape(-1, size, rest) if rest > 1 else m.reshape(1, -1, size).mT for m in (maps, smooth))
        for start in range(0, size, _BAND):
            stop = min(start + _BAND, size)
            low, high = max(start - reach, 0), min(stop + reach, size)
            lag = torch.arange(low, high) - torch.arange(start, stop)[:, None] + reach
            band = torch.where((lag >= 0) & (lag <= 2 * reach), kernel[lag.clamp(0, 2 * reach)], 0.0)
            result[:, start:stop] = band.to(maps) @ rows[:, low:high]
        maps = smooth
    return maps


def _of_size(image: MetaTensor, shape: Sequence[int]) -> MetaTensor:
    """Return the image, after making sure that a network can take one of this shape."""
    if math.prod(shape) > _LARGEST:
        raise ValueError(
            f"the network would see {' x '.join(map(str, shape))} voxels of {_name(image)}, more than it can take: "
            "give a mask of what is to be registered, or a larger spacing."
        )
    return image


class PreparePaird(Transform):
    """Make what a registration network sees of two images that lie on any grids in the world.

    Both images come to the fixed image's directions and the network's spacing, each on a grid that covers its own
    content (see `network_image`), and stacked into one tensor, padded at their ends to a common shape.

    Args:
        moving_key: the moving image `(C, *moving shape)`, a `MetaTensor`.
        fixed_key: the fixed image `(C, *fixed shape)`, a `MetaTensor` of as many axes.
        image_key: where the stacked pair `(2C, *shape)` goes.
        spacing: of the network, millimeters, along each axis or along all; None keeps the fixed image's own.
        background: value of the background of both images, or of moving and fixed.
        mask_keys: items with a mask `(1, *shape)` of the moving and of the fixed image, nonzero where the object is;
            an item that is not there leaves the content to `background`.
        initial_key: item with an affine `(D + 1, D + 1)` that takes fixed to moving points, RAS+ millimeters, to start
            from; nothing if it is not there.

    Raises:
        ValueError: when called, if an image has no affine, if their numbers of axes or channels differ, and as
            `network_image`.

    Example:
        >>> far = torch.eye(4)
        >>> far[:3, 3] = 500.0
        >>> moving = MetaTensor(torch.rand(1, 6, 7, 8), affine=far)
        >>> fixed = MetaTensor(torch.rand(1, 7, 7, 7), affine=torch.eye(4))
        >>> PreparePaird()({"moving": moving, "fixed": fixed})["image"].shape
        torch.Size([2, 7, 7, 8])
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        image_key: str = "image",
        spacing: Sequence[float] | float | None = None,
        background: float | Sequence[float] = 0.0,
        mask_keys: Sequence[str] = ("moving_mask", "fixed_mask"),
        initial_key: str = "initial_transform",
    ) -> None:
        self.moving_key, self.fixed_key, self.image_key = moving_key, fixed_key, image_key
        self.spacing = spacing
        both = (background, background) if isinstance(background, (int, float)) else tuple(background)
        if len(both) != 2 or len(mask_keys) != 2:
            raise ValueError(f"PreparePaird expects a background and a mask for each image, got {both}, {mask_keys}.")
        self.backgrounds = both
        self.mask_keys = tuple(mask_keys)
        self.initial_key = initial_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the pair, and with `network_moving` and `network_fixed`, the two images in it.

        The affine of `network_moving` places it where the initial affine takes its points from.
        """
        item = dict(data)
        moving, fixed = item[self.moving_key], item[self.fixed_key]
        if moving.dim() != fixed.dim() or moving.shape[0] != fixed.shape[0]:
            raise ValueError(
                "moving and fixed image should have as many axes and channels, got shapes "
                f"{list(moving.shape)} and {list(fixed.shape)}."
            )
        dims = fixed.dim() - 1
        axes = network_axes(field_affine(fixed), dims, self.spacing)
        started = moving
        if item.get(self.initial_key) is not None:
            initial = world_matrix(item[self.initial_key], dims)
            started = _placed(_plain(moving), torch.linalg.inv(initial) @ field_affine(moving), moving)
        masks = [item.get(key) for key in self.mask_keys]
        seen_moving = network_image(started, axes, masks[0], self.backgrounds[0])
        seen_fixed = network_image(fixed, axes, masks[1], self.backgrounds[1])
        item["network_moving"], item["network_fixed"] = seen_moving, seen_fixed
        item[self.image_key] = StackPair(pad=True)(seen_moving, seen_fixed)
        return item


class RestorePaird(Transform):
    """Turn a network's prediction for a pair that `PreparePaird` made into a field on the fixed image's own grid.

    Args:
        pred_key: the prediction `(D + C, *shape)`: the ddf in voxels of the stacked pair, then channels that do not
            matter here.
        fixed_key: the fixed image, whose grid the field gets.
        output_key: where the field `(D, *fixed shape)` goes, see `equireg.world`.
        initial_key: item with the affine from fixed to moving points that was started from, if there was one. It is put
            behind the network's answer as a step of its own, so that it holds beyond what the network saw.

    Raises:
        ValueError: when called, if the prediction does not cover what the network saw of the fixed image.

    Example:
        >>> image = MetaTensor(torch.rand(1, 4, 5), affine=torch.eye(4))
        >>> item = PreparePaird()({"moving": image, "fixed": image})
        >>> RestorePaird()({**item, "pred": torch.zeros(3, 4, 5)})["fixed_to_moving"].shape
        torch.Size([2, 4, 5])
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        pred_key: str = "pred",
        fixed_key: str = "fixed",
        output_key: str = "fixed_to_moving",
        initial_key: str = "initial_transform",
    ) -> None:
        self.pred_key, self.fixed_key, self.output_key = pred_key, fixed_key, output_key
        self.initial_key = initial_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the field added."""
        item = dict(data)
        fixed, initial = item[self.fixed_key], item.get(self.initial_key)
        answer = restored_field(item[self.pred_key], item["network_moving"], item["network_fixed"])
        steps: list[torch.Tensor] = [_covering(answer, field_affine(fixed), fixed.shape[1:])]
        steps += [] if initial is None else [_plain(initial)]
        field = sample_transform(steps, field_affine(fixed), fixed.shape[1:])
        item[self.output_key] = _placed(_plain(field), field_affine(fixed), fixed)
        return item


def restored_field(pred: torch.Tensor, network_moving: MetaTensor, network_fixed: MetaTensor) -> MetaTensor:
    """Place a network's ddf in the world.

    The point at fixed index `x` of what the network saw matches the point at moving index `x + ddf(x)`.

    Args:
        pred: `(D or more, *at least the fixed shape)`, voxels.
        network_moving: `(C, *moving shape)`, as the network saw it.
        network_fixed: `(C, *fixed shape)`, as the network saw it.

    Returns:
        The displacement field `(D, *fixed shape)` on the grid of `network_fixed`.

    Raises:
        ValueError: if the prediction is smaller than the fixed image.

    Example:
        >>> image = MetaTensor(torch.rand(1, 4, 5), affine=torch.eye(4))
        >>> restored_field(torch.ones(3, 4, 6), image, image).unique().tolist()
        [1.0]
    """
    shape = network_fixed.shape[1:]
    dims = len(shape)
    if pred.dim() != dims + 1 or pred.shape[0] < dims or any(n < m for n, m in zip(pred.shape[1:], shape)):
        raise ValueError(
            f"expected a prediction (D or more, *shape) that covers the fixed image, {list(shape)}, got "
            f"{list(pred.shape)}."
        )
    ddf = _plain(pred).detach().cpu()[(slice(dims),) + tuple(slice(size) for size in shape)]
    to_fixed = torch.linalg.inv(field_affine(network_fixed)) @ field_affine(network_moving)
    moved = mapped_indices(shape, lambda index, where: apply_affine(to_fixed, index + ddf[where]))
    return as_field(moved, field_affine(network_fixed))


def _covering(field: MetaTensor, affine: torch.Tensor, shape: Sequence[int]) -> MetaTensor:
    """Continue a displacement field until it covers a grid, along the affine map that fits it best.

    A continued displacement does not turn: beyond the field of a large rotation it would fold.

    Args:
        field: `(D, *field shape)`, voxels of its grid.
        affine: `(D + 1, D + 1)`, of the grid to cover.
        shape: its shape.

    Returns:
        `(D, *larger field shape)`, the same inside.
    """
    dims, own, old = len(shape), field_affine(field), torch.tensor(field.shape[1:])
    grid, size = covering_grid(affine, shape, own, dims)
    first = apply_affine(torch.linalg.inv(own), grid[:dims, dims:])[:, 0]  # of that grid, in indices of the field
    before = (-first).ceil().clamp(min=0).long()
    after = (first + torch.tensor(size) - old).ceil().clamp(min=0).long()
    if not bool((before + after).any()):
        return field
    values = place_affinely(_plain(field).unsqueeze(0), before.unsqueeze(0), (before + old + after).tolist())
    own = own.clone()
    own[:dims, dims] -= own[:dims, :dims] @ before.double()
    return MetaTensor(values[0], affine=four_by_four(own), meta=dict(field.meta))


def _placed(values: torch.Tensor, affine: torch.Tensor, source: MetaTensor) -> MetaTensor:
    """Place values in the world by an affine `(D + 1, D + 1)`; they keep the name of the file of `source`."""
    name = source.meta.get("filename_or_obj")
    return MetaTensor(values, affine=four_by_four(affine), meta={} if name is None else {"filename_or_obj": name})


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return convert_to_tensor(tensor, track_meta=False)


def _name(image: MetaTensor) -> str:
    name = image.meta.get("filename_or_obj")
    return f"'{name}'" if name else f"an image of shape {list(image.shape)}"
