"""Pure functions on dense displacement fields (ddfs).

A ddf is a tensor `(B, D, *spatial)` on the fixed grid: component `i` displaces along array axis `i`, in voxels, voxel
centers lie at integer indices, and `moved(x) = moving(x + ddf(x))`. This is the convention of
`monai.networks.blocks.Warp`. Every function here returns a new tensor, keeps no state and compiles with
`torch.jit.script`. `warp` is the only place in the project that samples an image.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F

__all__ = ["compose", "full_precision", "identity_grid", "invert", "jacobian_determinant", "resize", "warp"]

_CACHED = 2**16  # numbers of a ddf, for each thread, that what is computed from them fits the cache with


def identity_grid(
    shape: List[int], dtype: torch.dtype = torch.float32, device: Optional[torch.device] = None
) -> torch.Tensor:
    """Return the voxel indices of a grid, the map that leaves every point where it is.

    Args:
        shape: number of voxels along each of the `D` array axes.
        dtype: type of the result.
        device: device of the result.

    Returns:
        `(1, D, *shape)`, voxels; channel `i` holds the index along array axis `i`.

    Example:
        >>> identity_grid([2, 3])[0, 1].tolist()
        [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    """
    axes = [torch.arange(size, dtype=dtype, device=device) for size in shape]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).unsqueeze(0)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Return half precision and integers as float32; float32 and float64 as they are.

    Half precision cannot count voxels: bfloat16 has no number between 256 and 258.

    Args:
        tensor: any shape.

    Returns:
        The same values, shape and device.

    Example:
        >>> full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype, full_precision(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def warp(image: torch.Tensor, ddf: torch.Tensor, mode: str = "linear", padding: str = "border") -> torch.Tensor:
    """Sample an image at every voxel of a ddf's grid: `moved(x) = image(x + ddf(x))`.

    Equal to `monai.networks.blocks.Warp` where the two grids have one shape.

    Args:
        image: `(B, C, *moving shape)`; integer images need `mode="nearest"` and keep their type and, up to 2^53,
            their values.
        ddf: `(B, D, *fixed shape)`, voxels, floating point; the two shapes may differ.
        mode: "linear" or "nearest" interpolation.
        padding: what lies outside the image, "border" (its nearest voxel) or "zeros" (the infinite background).

    Returns:
        `(B, C, *fixed shape)` in the image's type.

    Raises:
        ValueError: for another mode or padding, and when shapes do not fit or an integer image is to be blended.

    Example:
        >>> ramp = torch.arange(4.0).reshape(1, 1, 4, 1)
        >>> warp(ramp, torch.full((1, 2, 4, 1), 0.5)).flatten().tolist()
        [0.5, 1.5, 2.5, 3.0]
    """
    dims = ddf.dim() - 2
    if ddf.shape[1] != dims or image.dim() != ddf.dim() or image.shape[0] != ddf.shape[0]:
        raise ValueError(
            f"warp expects image (B, C, *spatial) and ddf (B, D, *spatial) with one B and D spatial axes, "
            f"got {list(image.shape)} and {list(ddf.shape)}."
        )
    if mode not in ("linear", "nearest") or padding not in ("border", "zeros"):
        raise ValueError(
            f"warp expects mode 'linear' or 'nearest' and padding 'border' or 'zeros', got '{mode}', '{padding}'."
        )
    if mode == "linear" and not image.is_floating_point():
        raise ValueError(f"warp expects a floating point image for mode 'linear', got {image.dtype}.")
    ddf = full_precision(ddf)
    if mode == "nearest" and image.element_size() >= 4 and image.dtype != torch.float32:
        ddf = ddf.double()  # labels are not rounded: single precision has no number between 2^24 and 2^24 + 2
    grid = _sampling_grid(ddf, image)
    moved = F.grid_sample(
        image.to(ddf.dtype),
        grid,
        mode="bilinear" if mode == "linear" else "nearest",  # torch's word for linear in any dimension
        padding_mode=padding,
        align_corners=False,
    )
    return moved.to(image.dtype)


def _sampling_grid(ddf: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return where a ddf looks up an image, `(B, *fixed shape, D)`, in torch's normalized coordinates.

    They run from the middle of the image, 0, to its outer faces, -1 and 1, which lie apart even where an axis has a
    single voxel, and have the last array axis first. The channels stay apart in memory, as they are in the ddf.
    """
    dims = ddf.dim() - 2
    indices: List[torch.Tensor] = []
    for k in range(dims):
        shape = [1] * (dims + 1)
        shape[1 + k] = ddf.shape[2 + k]
        index = torch.arange(ddf.shape[2 + k], dtype=ddf.dtype, device=ddf.device).reshape(shape)
        # From the middle, exactly. Displacements come before scaling, which rounds: far from the origin they cancel.
        indices.append(index - 0.5 * (image.shape[2 + k] - 1))
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():  # nothing is to be kept: write each axis where it belongs
            grid = torch.empty_like(ddf, memory_format=torch.contiguous_format)
            for k in range(dims):
                axis = grid[:, dims - 1 - k]
                torch.add(ddf[:, k], indices[k], out=axis)
                axis.mul_(2.0 / image.shape[2 + k])
            return grid.movedim(1, -1)
    axes = [(ddf[:, k] + indices[k]).mul_(2.0 / image.shape[2 + k]) for k in range(dims - 1, -1, -1)]
    return torch.stack(axes, dim=1).movedim(1, -1)


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Chain two ddfs: points are displaced by `inner` first, then by `outer`.

    `compose(outer, inner)(x) = inner(x) + outer(x + inner(x))`, so that warping by `outer` and the result by `inner`
    is warping by their composition, but for one interpolation less.

    Args:
        outer: `(B, D, *shape)`, voxels; continued outside its grid by its border values.
        inner: `(B, D, *other shape)`, voxels, pointing into the grid of `outer`.

    Returns:
        `(B, D, *other shape)`, voxels.

    Example:
        >>> a, b = torch.full((1, 2, 4, 4), 1.0), torch.full((1, 2, 4, 4), 0.5)
        >>> compose(a, b).unique().tolist()
        [1.5]
    """
    moved = warp(outer, inner, mode="linear", padding="border")
    return moved.add_(inner) if moved.dtype == inner.dtype else inner + moved


def resize(ddf: torch.Tensor, factor: int) -> torch.Tensor:
    """Lift a ddf to a grid `factor` times as fine over the same field of view.

    Coarse voxel `c` covers the fine voxels `factor * c ... factor * c + factor - 1`, so its center sits at fine index
    `factor * c + (factor - 1) / 2`; values between centers are interpolated, values outside them continue the border,
    and displacements are multiplied by `factor`.

    Args:
        ddf: `(B, D, *shape)`, coarse voxels, D from 1 to 3.
        factor: positive integer.

    Returns:
        `(B, D, *(factor * shape))`, fine voxels.

    Raises:
        ValueError: if `factor` is less than 1.

    Example:
        >>> resize(torch.ones(1, 2, 3, 5), 4).shape, resize(torch.ones(1, 2, 3, 5), 4).max().item()
        (torch.Size([1, 2, 12, 20]), 4.0)
    """
    if factor < 1:
        raise ValueError(f"resize expects a factor of at least 1, got {factor}.")
    if factor == 1:
        return ddf
    dims = ddf.dim() - 2
    mode = "linear" if dims == 1 else ("bilinear" if dims == 2 else "trilinear")
    return F.interpolate(ddf * float(factor), scale_factor=[float(factor)] * dims, mode=mode, align_corners=False)


def invert(ddf: torch.Tensor, shape: Optional[List[int]] = None, iterations: int = 50) -> torch.Tensor:
    """Invert a ddf by fixed-point iteration.

    Solves `v(y) = -ddf(y + v(y))`, repeated `iterations` times from the negated mean displacement. It converges
    wherever neighboring displacements differ by less than their distance (Lipschitz constant below one) and there
    shrinks the error by that constant each time; folded fields have no inverse.

    Reference: Chen et al., "A simple fixed-point approach to invert a deformation field", Medical Physics 35(1), 2008,
    https://doi.org/10.1118/1.2816107.

    Args:
        ddf: `(B, D, *fixed shape)`, voxels; continued outside its grid by its border values.
        shape: shape of the moving grid, on which the inverse lives; the fixed shape if left out.
        iterations: how often to iterate.

    Returns:
        `(B, D, *shape)`, voxels: `compose(ddf, invert(ddf))` is about zero.

    Example:
        >>> invert(torch.full((1, 2, 4, 4), 1.5)).unique().tolist()
        [-1.5]
    """
    dims = ddf.dim() - 2
    size = ddf.shape[2:] if shape is None else shape
    mean = ddf.flatten(2).mean(dim=2).reshape([ddf.shape[0], dims] + [1] * dims)
    inverse = (-mean).expand([ddf.shape[0], dims] + list(size))
    for _ in range(iterations):
        inverse = warp(ddf, inverse, mode="linear", padding="border").neg_()
    return inverse


def _differences(ddf: torch.Tensor, axis: int, scheme: str) -> torch.Tensor:
    """Subtract neighbors along an axis: "central" gives twice the slope, "forward" the slope, on one voxel less."""
    size = ddf.shape[axis]
    if size == 1:
        return torch.zeros_like(ddf)
    if scheme == "forward":
        return ddf.narrow(axis, 1, size - 1) - ddf.narrow(axis, 0, size - 1)
    # At the ends only one neighbor exists.
    first = (ddf.narrow(axis, 1, 1) - ddf.narrow(axis, 0, 1)).mul_(2.0)
    middle = ddf.narrow(axis, 2, size - 2) - ddf.narrow(axis, 0, size - 2)
    last = (ddf.narrow(axis, size - 1, 1) - ddf.narrow(axis, size - 2, 1)).mul_(2.0)
    return torch.cat([first, middle, last], dim=axis)


def _cross(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return `a * b - c * d`."""
    return (a * b).addcmul_(c, d, value=-1.0)


def _determinant(ddf: torch.Tensor, scheme: str, start: int, stop: int) -> torch.Tensor:
    """Return the determinants `(B, 1, *shape)` of the planes from `start` to `stop` of the first axis."""
    dims = ddf.dim() - 2
    one = 2.0 if scheme == "central" else 1.0  # slopes are doubled, exactly, and halved once in the end
    before = min(start, 1) if scheme == "central" else 0
    planes = ddf[:, :, start - before : stop + 1]
    columns: List[torch.Tensor] = []
    for k in range(dims):
        part = planes if k == 0 else ddf[:, :, start:stop]
        if scheme == "forward":
            for other in range(1, dims):
                if other != k and ddf.shape[2 + other] > 1:
                    part = part.narrow(2 + other, 0, ddf.shape[2 + other] - 1)
        slopes = _differences(part, 2 + k, scheme)
        columns.append(slopes.narrow(2, before, stop - start) if k == 0 else slopes)
    if dims == 1:
        return (columns[0] + one) / one
    a, b = columns[0], columns[1]
    a0, a1 = a[:, 0:1] + one, a[:, 1:2]
    b0, b1 = b[:, 0:1], b[:, 1:2] + one
    if dims == 2:
        return _cross(a0, b1, a1, b0).mul_(one**-2)
    c = columns[2]
    a2, b2 = a[:, 2:3], b[:, 2:3]
    c0, c1, c2 = c[:, 0:1], c[:, 1:2], c[:, 2:3] + one
    determinant = _cross(a0, _cross(b1, c2, b2, c1), a1, _cross(b0, c2, b2, c0))
    return determinant.addcmul_(a2, _cross(b0, c1, b1, c0)).mul_(one**-3)


def jacobian_determinant(ddf: torch.Tensor, scheme: str = "central") -> torch.Tensor:
    """Return the determinant of the Jacobian of `x + ddf(x)`: the local change of volume, not positive where it folds.

    Args:
        ddf: `(B, D, *shape)`, voxels, D from 1 to 3.
        scheme: "central" differences (one-sided at the ends) give a value per voxel; "forward" differences give one
            per cell between voxels, and see folds of a single voxel that central differences step over. An axis of one
            voxel does not change.

    Returns:
        `(B, 1, *shape)`, or for "forward" one less along each axis longer than one voxel; no unit.

    Raises:
        ValueError: for another scheme, or when the channels are not 1 to 3 and equal to the spatial axes.

    Example:
        >>> grid = identity_grid([4, 4, 4])
        >>> round(jacobian_determinant(0.1 * grid).mean().item(), 4)
        1.331
    """
    dims = ddf.dim() - 2
    if scheme not in ("central", "forward"):
        raise ValueError(f"jacobian_determinant expects scheme 'central' or 'forward', got '{scheme}'.")
    if dims < 1 or dims > 3 or ddf.shape[1] != dims:
        raise ValueError(f"jacobian_determinant expects (B, D, *spatial) with D from 1 to 3, got {list(ddf.shape)}.")
    end = ddf.shape[2] if scheme == "central" or ddf.shape[2] == 1 else ddf.shape[2] - 1
    # Gradients need everything at once; else what lies in between stays in the processor's cache, plane by plane.
    step = end
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        if ddf.device.type == "cpu" and not (torch.is_grad_enabled() and ddf.requires_grad):
            step = max(1, int(_CACHED * torch.get_num_threads() * ddf.shape[2] / max(1, ddf.numel())))
    parts = [_determinant(ddf, scheme, start, min(start + step, end)) for start in range(0, end, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
