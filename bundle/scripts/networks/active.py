"""Where an image has content, and how its grid moves with it: tensor arithmetic that traces, scripts and exports.

Background is exactly 0, and content is every voxel at which any channel differs from it. The networks look at the
content's bounding box, grown by a margin: it follows the content wherever the content moves, and is found from the
image alone, never by comparing features. Boxes are integer tensors `(B, D)` so that each sample of a batch has its own.
"""

from typing import Any, List, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    "affine_slopes",
    "box_mask",
    "check_pair",
    "check_precision",
    "clamp_to_box",
    "content_box",
    "continue_affinely",
    "continue_along",
    "crop_to_content",
    "field_of_view",
    "has_content",
    "is_count",
    "keep_if_content",
    "place_affinely",
    "shift_grid",
]


def is_count(value: Any, least: int) -> bool:
    """Tell whether an argument is a whole number of at least `least`, and of an integer type."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_pair(moving: torch.Tensor, fixed: torch.Tensor, spatial_dims: int, in_channels: int) -> None:
    """Refuse a pair of images that a network cannot take.

    Values are looked at in eager mode only: an exported graph has no place for an exception.

    Args:
        moving: `(B, C, *moving shape)`.
        fixed: `(B, C, *fixed shape)`; the spatial shapes may differ.
        spatial_dims: number of spatial axes the network was built for.
        in_channels: number of channels it was built for.

    Raises:
        ValueError: if an image has another number of axes or channels, an empty axis, another batch size, type or
            device than the other, integers, or values that are NaN or infinite.
    """
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.dim() != spatial_dims + 2:
            raise ValueError(
                f"the {name} image must have {spatial_dims + 2} axes (batch, channel and {spatial_dims} spatial ones), "
                f"got shape {list(image.shape)}."
            )
        if image.shape[1] != in_channels:
            raise ValueError(
                f"the {name} image must have {in_channels} channel(s), got {image.shape[1]} in shape "
                f"{list(image.shape)}."
            )
        if image.numel() == 0:
            raise ValueError(f"the {name} image must not have an empty axis, got shape {list(image.shape)}.")
        if not image.is_floating_point():
            raise ValueError(f"the {name} image must be of a floating point type, got {image.dtype}.")
    if moving.shape[0] != fixed.shape[0]:
        raise ValueError(
            f"moving and fixed must have one batch size, got {moving.shape[0]} and {fixed.shape[0]} in shapes "
            f"{list(moving.shape)} and {list(fixed.shape)}."
        )
    if moving.dtype != fixed.dtype or moving.device != fixed.device:
        raise ValueError(
            f"moving and fixed must be of one type on one device, got {moving.dtype} on {moving.device} and "
            f"{fixed.dtype} on {fixed.device}."
        )
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        _check_finite(moving, fixed)


@torch.jit.unused
def _check_finite(moving: torch.Tensor, fixed: torch.Tensor) -> None:
    """Refuse NaN and infinity, which would spread over the batch and stay in a network's running statistics."""
    if torch.isfinite(moving).all() & torch.isfinite(fixed).all():  # the device is waited for once, not twice
        return
    for name, image in (("moving", moving), ("fixed", fixed)):
        count = int((~torch.isfinite(image)).sum())
        if count > 0:
            raise ValueError(f"the {name} image must be finite, got {count} voxel value(s) that are NaN or infinite.")


@torch.jit.unused
def _check_precision(image: torch.Tensor, weight: torch.Tensor) -> None:
    device = image.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if image.dtype not in (weight.dtype, autocast):
        raise ValueError(f"the images must be of the network's type {weight.dtype}, got {image.dtype}.")


def check_precision(image: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse, in eager mode, an image of another type than a network's, but for that of the autocast around it.

    Args:
        image: any shape.
        weight: one of the network's parameters.

    Raises:
        ValueError: naming both types.
    """
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        _check_precision(image, weight)


def has_content(image: torch.Tensor) -> torch.Tensor:
    """Tell for each sample whether anything in it differs from background.

    Args:
        image: `(B, C, *shape)`.

    Returns:
        `(B,)`, boolean.

    Example:
        >>> has_content(torch.tensor([[[0.0, 0.0]], [[0.0, 0.5]]])).tolist()
        [False, True]
    """
    return (image != 0).flatten(1).any(dim=1)


def keep_if_content(ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Replace the ddf of a sample by zero where either image is empty: nothing is there to register.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        moving: `(B, C, *moving shape)`.
        fixed: `(B, C, *fixed shape)`.

    Returns:
        `(B, D, *shape)`, voxels.
    """
    keep = has_content(moving) & has_content(fixed)
    return torch.where(keep.reshape([-1] + [1] * (ddf.dim() - 1)), ddf, torch.zeros_like(ddf))


def content_box(image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find the bounding box of each sample's content.

    Args:
        image: `(B, C, *shape)`.

    Returns:
        First and last index of the content along each axis, both `(B, D)`, integer; an empty sample gives the whole
        canvas.

    Example:
        >>> first, last = content_box(torch.tensor([[[0.0, 0.0, 3.0, 1.0, 0.0]]]))
        >>> first.tolist(), last.tolist()
        ([[2]], [[3]])
    """
    content = (image != 0).any(dim=1)
    empty = ~content.flatten(1).any(dim=1)
    firsts: List[torch.Tensor] = []
    lasts: List[torch.Tensor] = []
    for k in range(image.dim() - 2):
        size = image.shape[2 + k]
        profile = content.transpose(1, 1 + k).unsqueeze(-1).flatten(2).any(dim=2) | empty.unsqueeze(1)  # (B, size)
        index = torch.arange(size, device=image.device).unsqueeze(0)
        firsts.append(torch.where(profile, index, torch.full_like(index, size)).amin(dim=1))
        lasts.append(torch.where(profile, index, torch.full_like(index, -1)).amax(dim=1))
    return torch.stack(firsts, dim=1), torch.stack(lasts, dim=1)


def field_of_view(image: torch.Tensor, share: float = 0.4) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find where each sample's image is cut off, and thus what it cannot show.

    Where an object ends little of it touches the side of its bounding box; where an image ends before the object does,
    much. Brains without skulls, 2 mm, cover at most 0.02 of a side where they end and 0.16 to 0.9 where more than a few
    voxels are cut off. Of the box of a ball, `n` voxels wide, its outermost layer covers less than `5 / n` (of a
    disc's, the root of that): what is small is taken for cut only where it covers more.

    Args:
        image: `(B, C, *shape)`.
        share: a side is a cut if content covers more of it than this share of its length along each axis.

    Returns:
        First and last index that the image shows along each axis, both `(B, D)`, float64: the content's where it is
        cut, and infinite where it ends by itself or there is none.

    Example:
        >>> away = torch.arange(20.0) - 9
        >>> disc = (away[:, None].square() + away.square() <= 64).float()
        >>> disc[12:] = 0
        >>> first, last = field_of_view(disc[None, None])
        >>> first.tolist(), last.tolist()
        ([[-inf, -inf]], [[11.0, inf]])
    """
    content, dims = (image != 0).any(dim=1), image.dim() - 2
    first, last = content_box(image)
    size = (last - first + 1).double()
    firsts: List[torch.Tensor] = []
    lasts: List[torch.Tensor] = []
    for k in range(dims):
        thick = size[:, k : k + 1]
        round_one = (5.0 / thick) ** (0.5 * (dims - 1))
        least = round_one.clamp(min=share ** (dims - 1)) * size.prod(dim=1, keepdim=True) / thick
        counts = content.transpose(1, 1 + k).unsqueeze(-1).flatten(2).sum(dim=2).double()  # (B, size)
        low, high = first[:, k : k + 1], last[:, k : k + 1]
        firsts.append(low.double().masked_fill(counts.gather(1, low) <= least, -float("inf")))
        lasts.append(high.double().masked_fill(counts.gather(1, high) <= least, float("inf")))
    return torch.cat(firsts, dim=1), torch.cat(lasts, dim=1)


def box_mask(first: torch.Tensor, last: torch.Tensor, shape: List[int]) -> torch.Tensor:
    """Mark the voxels of a grid that lie in each sample's box.

    Args:
        first: `(B, D)`, first index of the box along each axis; may lie outside the grid, and be infinite.
        last: `(B, D)`, last index.
        shape: shape of the grid.

    Returns:
        `(B, 1, *shape)`, boolean.

    Example:
        >>> box_mask(torch.tensor([[1]]), torch.tensor([[2]]), [4]).tolist()
        [[[False, True, True, False]]]
    """
    mask = torch.ones([first.shape[0], 1] + [1] * len(shape), dtype=torch.bool, device=first.device)
    for k, size in enumerate(shape):
        index = torch.arange(size, device=first.device).unsqueeze(0)
        inside = (index >= first[:, k : k + 1]) & (index <= last[:, k : k + 1])
        view = [first.shape[0]] + [1] * (len(shape) + 1)
        view[2 + k] = size
        mask = mask & inside.reshape(view)
    return mask


def _take(values: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Pick indices `(B, n)` along one axis of `(B, C, *shape)`, each sample its own."""
    view = [index.shape[0]] + [1] * (values.dim() - 1)
    view[axis] = index.shape[1]
    size = list(values.shape)
    size[axis] = index.shape[1]
    return values.gather(axis, index.reshape(view).expand(size))


def clamp_to_box(values: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Continue what lies inside each sample's box over the whole grid, each voxel taking the nearest value in the box.

    Args:
        values: `(B, C, *shape)`.
        first: `(B, D)`, first index of the box along each axis, inside the grid.
        last: `(B, D)`, last index.

    Returns:
        `(B, C, *shape)`.

    Example:
        >>> clamp_to_box(torch.arange(5.0).reshape(1, 1, 5), torch.tensor([[1]]), torch.tensor([[3]])).tolist()
        [[[1.0, 1.0, 2.0, 3.0, 3.0]]]
    """
    for k in range(values.dim() - 2):
        index = torch.arange(values.shape[2 + k], device=values.device).unsqueeze(0)
        index = torch.minimum(torch.maximum(index, first[:, k : k + 1]), last[:, k : k + 1])
        values = _take(values, index, 2 + k)
    return values


def continue_affinely(ddf: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Continue a ddf from each sample's box over the whole grid, along the affine map that fits it best in the box.

    Outside the box, `ddf(x) = ddf(c) + slope (x - c)`, with `c` the nearest voxel inside and `slope` of the least
    squares fit over the box. The map `x + ddf(x)` then follows every rotation (and every other affine map) of its
    values, which a continued displacement does not. Along an axis on which the box is one voxel thick there is nothing
    to fit, and the displacement is continued.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        first: `(B, D)`, first index of the box along each axis, inside the grid.
        last: `(B, D)`, last index.

    Returns:
        `(B, D, *shape)`, voxels.

    Example:
        >>> ddf = torch.tensor([0.0, 2.0, 4.0, 6.0, 0.0]).reshape(1, 1, 5)
        >>> continue_affinely(ddf, torch.tensor([[1]]), torch.tensor([[3]])).tolist()
        [[[0.0, 2.0, 4.0, 6.0, 8.0]]]
    """
    return continue_along(clamp_to_box(ddf, first, last), affine_slopes(ddf, first, last), first, last)


def affine_slopes(ddf: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Fit an affine map to each sample's box of a ddf by least squares, and return its slopes.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        first: `(B, D)`, first index of the box along each axis, inside the grid.
        last: `(B, D)`, last index.

    Returns:
        `(B, D, D)`: how much each component of the ddf grows in a voxel along each axis; 0 along an axis on which the
        box is one voxel thick.

    Example:
        >>> affine_slopes(torch.tensor([[[0.0, 2.0, 4.0, 9.0]]]), torch.tensor([[0]]), torch.tensor([[2]])).tolist()
        [[[2.0]]]
    """
    shape = list(ddf.shape[2:])
    inside = box_mask(first, last, shape).to(ddf.dtype)
    size = (last - first + 1).to(ddf.dtype)
    count = size.prod(dim=1).reshape([-1, 1])
    mean = (ddf * inside).flatten(2).sum(dim=2) / count
    deviation = (ddf - mean.reshape(list(mean.shape) + [1] * len(shape))) * inside
    slopes: List[torch.Tensor] = []
    for k in range(len(shape)):
        index = torch.arange(shape[k], device=ddf.device).unsqueeze(0).to(ddf.dtype)
        centered = index - 0.5 * (first + last)[:, k : k + 1].to(ddf.dtype)
        # On a full grid the axes are uncorrelated: each slope is a covariance over a variance, (n^2 - 1) / 12.
        covariance = (deviation * _along(centered, k, len(shape))).flatten(2).sum(dim=2) / count
        slopes.append(covariance / ((size[:, k : k + 1] ** 2 - 1.0) / 12.0).clamp(min=0.25))
    return torch.stack(slopes, dim=2)


def continue_along(ddf: torch.Tensor, slopes: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Let a ddf that is constant outward of each sample's box grow there along slopes; inside it stays as it is.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        slopes: `(B, D, D)`, see `affine_slopes`.
        first: `(B, D)`, first index of the box along each axis; it may lie outside the grid.
        last: `(B, D)`, last index.

    Returns:
        `(B, D, *shape)`, voxels.

    Example:
        >>> ddf = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
        >>> continue_along(ddf, torch.tensor([[[3.0]]]), torch.tensor([[1]]), torch.tensor([[2]])).tolist()
        [[[-3.0, 0.0, 2.0, 5.0]]]
    """
    dims = ddf.dim() - 2
    for k in range(dims):
        index = torch.arange(ddf.shape[2 + k], device=ddf.device).unsqueeze(0)
        nearest = torch.minimum(torch.maximum(index, first[:, k : k + 1]), last[:, k : k + 1])
        outside = _along((index - nearest).to(ddf.dtype), k, dims)
        ddf = ddf + slopes[:, :, k].reshape(list(slopes.shape[:2]) + [1] * dims) * outside
    return ddf


def place_affinely(ddf: torch.Tensor, start: torch.Tensor, shape: List[int]) -> torch.Tensor:
    """Place a ddf on another grid, whole voxels away, and continue it there along the affine map that fits it best.

    Args:
        ddf: `(B, D, *old shape)`, voxels.
        start: `(B, D)`, index of its first voxel on the new grid; it may lie outside.
        shape: of the new grid.

    Returns:
        `(B, D, *shape)`, voxels.

    Example:
        >>> place_affinely(torch.tensor([[[2.0, 5.0]]]), torch.tensor([[1]]), [4]).tolist()
        [[[-1.0, 2.0, 5.0, 8.0]]]
    """
    last = torch.tensor(ddf.shape[2:], device=ddf.device) - 1
    slopes = affine_slopes(ddf, torch.zeros_like(start), last.expand_as(start))
    return continue_along(shift_grid(ddf, -start, shape, "border"), slopes, start, start + last)


def _along(values: torch.Tensor, axis: int, dims: int) -> torch.Tensor:
    """View values along an axis, `(B, n)`, so that they spread over `(B, C, *shape)`."""
    view = [values.shape[0]] + [1] * (dims + 1)
    view[2 + axis] = values.shape[1]
    return values.reshape(view)


def shift_grid(values: torch.Tensor, offset: torch.Tensor, shape: List[int], padding: str) -> torch.Tensor:
    """Move each sample's grid by whole voxels and crop or pad it: `result(x) = values(x + offset)`.

    Args:
        values: `(B, C, *old shape)`.
        offset: `(B, D)`, integer, voxels.
        shape: shape of the result.
        padding: outside the old grid, "zeros" (background) or "border" (the nearest value).

    Returns:
        `(B, C, *shape)`.

    Example:
        >>> shift_grid(torch.arange(1.0, 4.0).reshape(1, 1, 3), torch.tensor([[1]]), [4], "zeros").tolist()
        [[[2.0, 3.0, 0.0, 0.0]]]
    """
    inside = torch.ones([1] * values.dim(), dtype=torch.bool, device=values.device)
    for k, size in enumerate(shape):
        old = values.shape[2 + k]
        index = torch.arange(size, device=values.device).unsqueeze(0) + offset[:, k : k + 1]
        values = _take(values, index.clamp(0, old - 1), 2 + k)
        view = [index.shape[0]] + [1] * (values.dim() - 1)
        view[2 + k] = size
        inside = inside & ((index >= 0) & (index < old)).reshape(view)
    return values * inside.to(values.dtype) if padding == "zeros" else values


def crop_to_content(image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Leave away the background around each sample's content, where that can be known: in eager mode.

    A scripted, traced or compiled graph keeps the whole canvas, as its shapes cannot depend on values.

    Args:
        image: `(B, C, *shape)`.

    Returns:
        `(B, C, *size)`, each sample's content in its first corner, of the size of the largest one or of the canvas; and
        the first index of that corner on the canvas, `(B, D)`, integer.

    Example:
        >>> crop, first = crop_to_content(torch.tensor([[[0.0, 0.0, 3.0, 1.0, 0.0]]]))
        >>> crop.tolist(), first.tolist()
        ([[[3.0, 1.0]]], [[2]])
    """
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        first, last = content_box(image)
        size: List[int] = (last - first + 1).amax(dim=0).tolist()
        return shift_grid(image, first, size, "zeros"), first
    return image, torch.zeros([image.shape[0], image.dim() - 2], dtype=torch.long, device=image.device)


def pad_all(image: torch.Tensor, margin: int) -> torch.Tensor:
    """Surround `(B, C, *shape)` by `margin` voxels of background on every side."""
    return F.pad(image, [margin] * (2 * (image.dim() - 2)))
