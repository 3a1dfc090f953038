"""Synthetic anatomy: pairs of images to register that need no download.

Everything is a function of its arguments and of a `numpy.random.Generator` alone: the same state gives the same result.
Images and label maps are channel-first tensors `(1, *shape)`, background is exactly 0, ddfs follow `fields`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .fields import warp

__all__ = [
    "KINDS",
    "label_map",
    "paint",
    "per_axis",
    "random_levels",
    "shift",
    "smooth_field",
    "smooth_noise",
    "synthetic_pair",
    "vessel_tree",
]

KINDS = ("labels", "vessels", "mixed")
DARKEST = 1e-3  # the least value of content: it must stay apart from background, which is 0


def per_axis(value: float | Sequence[float], dims: int, name: str) -> list[float]:
    """Return one value per axis from a number or a sequence.

    Args:
        value: one number for all axes, or `dims` of them.
        dims: number of spatial axes.
        name: what the value is, for the error message.

    Raises:
        ValueError: if a sequence has another length than `dims`.

    Example:
        >>> per_axis(2, 3, "margin")
        [2.0, 2.0, 2.0]
    """
    values = [float(value)] * dims if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != dims:
        raise ValueError(f"{name} expects one number or {dims}, got {value}.")
    return values


def _spline_weights(size: int, points: int) -> torch.Tensor:
    """Return the `(size, points)` matrix that interpolates control values along an axis by a cubic B-spline.

    The first and last control points sit on the first and last voxel; beyond them values are mirrored. Dividing by the
    spline's values at the control points makes the curve pass through them.
    """
    if points == 1:
        return torch.ones(size, 1)

    def basis(at: np.ndarray) -> np.ndarray:
        taps = np.floor(at)[:, None] + np.arange(-1, 3)
        t = np.abs(at[:, None] - taps)
        weight = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
        column = np.abs(taps).astype(int) % (2 * points - 2)
        matrix = np.zeros((len(at), points))
        rows = np.repeat(np.arange(len(at))[:, None], 4, axis=1)
        np.add.at(matrix, (rows, np.minimum(column, 2 * points - 2 - column)), weight)
        return matrix

    at = np.linspace(0, points - 1, size) if size > 1 else np.array([(points - 1) / 2])
    return torch.from_numpy(basis(at) @ np.linalg.inv(basis(np.arange(points, dtype=float)))).float()


def smooth_noise(
    channels: int, shape: Sequence[int], points: int | Sequence[int], generator: np.random.Generator
) -> torch.Tensor:
    """Return smooth random fields: standard normal control values joined by cubic splines.

    Args:
        channels: number of independent fields.
        shape: voxels along each axis.
        points: control points along each axis, the outermost on the border voxels; one number or one per axis.
        generator: source of the noise.

    Returns:
        `(channels, *shape)`, standard deviation about 1 at the control points.

    Raises:
        ValueError: if a size or a number of points is less than 1.

    Example:
        >>> smooth_noise(2, (5, 7), 3, np.random.default_rng(0)).shape
        torch.Size([2, 5, 7])
    """
    counts = [int(p) for p in per_axis(points, len(shape), "points")]
    if min(counts) < 1 or min(shape) < 1:
        raise ValueError(f"smooth_noise expects positive sizes and points, got shape {list(shape)}, points {counts}.")
    field = torch.from_numpy(generator.standard_normal((channels, *counts), dtype=np.float32))
    for k, (size, count) in enumerate(zip(shape, counts)):
        field = (field.movedim(1 + k, -1) @ _spline_weights(size, count).T).movedim(-1, 1 + k)
    return field.contiguous()


def smooth_field(
    shape: Sequence[int],
    points: int | Sequence[int],
    sigma: float | Sequence[float],
    generator: np.random.Generator,
) -> torch.Tensor:
    """Return a random smooth ddf.

    Args:
        shape: voxels along each of the `D` axes.
        points: control points along each axis, one number or one per axis.
        sigma: standard deviation of the displacement at the control points, voxels, one number or one per axis.
        generator: source of the noise.

    Returns:
        `(1, D, *shape)`, voxels.

    Raises:
        ValueError: for sizes or points below 1, or sequences that do not match the shape.

    Example:
        >>> smooth_field((8, 8), points=3, sigma=0.0, generator=np.random.default_rng(0)).abs().max().item()
        0.0
    """
    scale = torch.tensor(per_axis(sigma, len(shape), "sigma")).reshape([-1] + [1] * len(shape))
    return (scale * smooth_noise(len(shape), shape, points, generator)).unsqueeze(0)


def shift(image: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """Move content by whole voxels: `result(x) = image(x - offsets)`, zeros come in, what leaves the canvas is lost.

    Args:
        image: `(C, *shape)`, any type.
        offsets: voxels along each axis.

    Returns:
        `(C, *shape)`, a new tensor.

    Raises:
        ValueError: if there is not one offset per spatial axis.

    Example:
        >>> shift(torch.tensor([[1, 2, 3]]), [1]).tolist()
        [[0, 1, 2]]
    """
    if len(offsets) != image.dim() - 1:
        raise ValueError(f"shift expects one offset per spatial axis of {list(image.shape)}, got {list(offsets)}.")
    source, target = [slice(None)], [slice(None)]
    for size, offset in zip(image.shape[1:], offsets):
        step = max(-size, min(size, int(offset)))
        source.append(slice(max(-step, 0), size - max(step, 0)))
        target.append(slice(max(step, 0), size - max(-step, 0)))
    moved = torch.zeros_like(image)
    moved[tuple(target)] = image[tuple(source)]
    return moved


def _half_extents(shape: Sequence[int], margin: float | Sequence[float] | None) -> np.ndarray:
    """Return the half axes of the largest centered ellipsoid that leaves `margin` voxels free on every side."""
    margins = [max(1.0, s // 8) for s in shape] if margin is None else per_axis(margin, len(shape), "margin")
    extents = (np.array(shape) - 1) / 2 - np.array(margins)
    if extents.min() < 2:
        raise ValueError(
            f"A canvas of {list(shape)} voxels has no room for anatomy inside margins of {margins} voxels; "
            "expected a larger shape, or smaller shifts and deformations."
        )
    return extents


def label_map(
    shape: Sequence[int],
    labels: int,
    generator: np.random.Generator,
    margin: float | Sequence[float] | None = None,
) -> torch.Tensor:
    """Draw a random body made of smoothly bounded regions, on zero background.

    Every voxel of the body takes the label whose smooth random field is largest there.

    Args:
        shape: voxels along each axis.
        labels: how many labels to draw from, 1 to 255; some may not appear.
        generator: source of the noise.
        margin: voxels kept empty on every side, one number or one per axis; an eighth of the size if left out.

    Returns:
        `(1, *shape)`, uint8, 0 is background.

    Raises:
        ValueError: if the number of labels is not in 1 to 255, or the margins leave no room.

    Example:
        >>> int(label_map((32, 32), 5, np.random.default_rng(0)).max()) <= 5
        True
    """
    if not 1 <= labels <= 255:
        raise ValueError(f"label_map expects 1 to 255 labels, got {labels}.")
    extents = _half_extents(shape, margin) * generator.uniform(0.88, 1.0, len(shape))
    radius = torch.zeros(())
    for k, (size, extent) in enumerate(zip(shape, extents)):
        at = (torch.arange(size) - (size - 1) / 2) / float(extent)
        radius = radius + (at**2).reshape([-1] + [1] * (len(shape) - 1 - k))
    # The noise only dents the ellipsoid, never bulges it, so the margin holds for every draw.
    dent = 0.22 * torch.sigmoid(1.5 * smooth_noise(1, shape, 5, generator)[0])
    regions = smooth_noise(labels, shape, 9 if len(shape) == 2 else 8, generator).argmax(dim=0) + 1
    return (regions * (radius < (1 - dent) ** 2)).to(torch.uint8).unsqueeze(0)


def _branches(extents: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Grow a branching tree inside an ellipsoid: center line points `(N, D)` relative to its center, radii `(N,)`."""
    dims, reach = len(extents), float(extents.min())
    width = max(0.035 * reach, 1.1)
    inner = extents - width

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)

    roots = 3 if dims == 2 else 6
    root = unit(generator.standard_normal((1, dims))) * 0.7
    position = np.repeat(root * inner, roots, axis=0)
    heading = unit(unit(-root) + 0.7 * generator.standard_normal((roots, dims)))
    points, radii = [position], [np.full(roots, width)]
    for generation in range(5):
        steps = max(3, round(0.45 * reach * 0.85**generation * generator.uniform(0.8, 1.2)))
        radius = max(width * 0.85**generation, 0.8)
        for _ in range(steps):
            inward = -position / inner**2 * reach
            near_rim = np.clip((position**2 / inner**2).sum(axis=1, keepdims=True) - 0.6, 0, 1)
            wander = 0.12 * generator.standard_normal(position.shape)
            heading = unit(heading + wander + 0.3 * near_rim * inward)
            position = position + heading
            points.append(position)
            radii.append(np.full(len(position), radius))
        side = generator.standard_normal(heading.shape)
        side = unit(side - (side * heading).sum(axis=1, keepdims=True) * heading)
        angle = generator.uniform(0.35, 0.8, (2, len(heading), 1))
        turns = [heading * np.cos(a) + sign * side * np.sin(a) for a, sign in zip(angle, (1, -1))]
        position, heading = np.concatenate([position, position]), unit(np.concatenate(turns))
    line, thickness = np.concatenate(points), np.concatenate(radii)
    inside = (line**2 / inner**2).sum(axis=1) < 1
    return line[inside], thickness[inside]


def vessel_tree(
    shape: Sequence[int], generator: np.random.Generator, margin: float | Sequence[float] | None = None
) -> torch.Tensor:
    """Draw a tree of branching, winding tubes that thin out, like the vessels of a retina.

    Args:
        shape: voxels along each axis.
        generator: source of the randomness.
        margin: voxels kept empty on every side, one number or one per axis; an eighth of the size if left out.

    Returns:
        `(1, *shape)`, uint8, 1 in the vessels.

    Raises:
        ValueError: if the margins leave no room.

    Example:
        >>> vessel_tree((32, 32), np.random.default_rng(0)).unique().tolist()
        [0, 1]
    """
    line, radii = _branches(_half_extents(shape, margin), generator)
    line = line + (np.array(shape) - 1) / 2
    nearest = np.rint(line).astype(int)
    reach = math.ceil(radii.max())
    tree = np.zeros(tuple(shape), dtype=np.uint8)
    for offset in np.ndindex(*[2 * reach + 1] * len(shape)):
        voxels = nearest + (np.array(offset) - reach)
        hit = voxels[((voxels - line) ** 2).sum(axis=1) <= radii**2]
        tree[tuple(hit.T)] = 1
    return torch.from_numpy(tree).unsqueeze(0)


def _keep_content(image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """Clip content to `[DARKEST, 1]` and set everything else to exactly 0."""
    return torch.where(content, image.clamp(DARKEST, 1.0), torch.zeros_like(image))


def random_levels(count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw one brightness for each label, all of them distinct.

    Args:
        count: number of labels.
        generator: source of the randomness.

    Returns:
        `(count,)`, about 0.2 to 0.95.

    Example:
        >>> random_levels(3, np.random.default_rng(0)).shape
        (3,)
    """
    levels = np.linspace(0.2, 0.95, count) if count > 1 else generator.uniform(0.2, 0.95, count)
    return generator.permutation(levels) + generator.uniform(-0.03, 0.03, count)


def paint(labels: torch.Tensor, generator: np.random.Generator, levels: np.ndarray | None = None) -> torch.Tensor:
    """Give every label a random, distinct brightness, with texture, a soft shading, noise and blur inside the content.

    Args:
        labels: `(1, *shape)`, integers, 0 is background.
        generator: source of the randomness.
        levels: brightness of the labels 1, 2, ..., at least as many as there are; random if left out.

    Returns:
        `(1, *shape)`, float32, content in (0, 1], background exactly 0.

    Raises:
        ValueError: if labels are negative or not 2D or 3D, or there are too few levels.

    Example:
        >>> paint(torch.tensor([[[0, 1], [2, 0]]]), np.random.default_rng(0))[0, 0, 0].item()
        0.0
    """
    dims = labels.dim() - 1
    if dims not in (2, 3) or int(labels.min()) < 0:
        raise ValueError(f"paint expects labels (1, *2D or 3D shape), not negative, got {list(labels.shape)}.")
    count, shape = int(labels.max()), labels.shape[1:]
    if levels is None:
        levels = random_levels(count, generator)
    elif len(levels) < count:
        raise ValueError(f"paint expects a level for each of {count} labels, got {len(levels)}.")
    content = labels != 0
    image = torch.from_numpy(np.concatenate([[0.0], levels])).float()[labels.long()]
    noise = torch.from_numpy(generator.standard_normal(labels.shape, dtype=np.float32))
    image = (image + float(generator.uniform(0.0, 0.04)) * noise) * content
    # Blurring image and mask alike and dividing keeps the content's rim from darkening.
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    soft, mask = pool(torch.stack([image, content.float()]), 3, stride=1, padding=1)
    blend = float(generator.uniform(0.0, 0.8))
    image = (1 - blend) * image + blend * soft / mask.clamp(min=1e-6)
    texture = smooth_noise(1, shape, [max(4, s // 4) for s in shape], generator)
    shading = smooth_noise(1, shape, 3, generator)
    image = image + float(generator.uniform(0.02, 0.07)) * texture + float(generator.uniform(0.0, 0.06)) * shading
    return _keep_content(image, content)


def _bounded_field(shape: Sequence[int], limits: Sequence[float], generator: np.random.Generator) -> torch.Tensor:
    """Return a ddf `(1, D, *shape)` of a coarse and a fine part that nowhere exceeds `limits` voxels along an axis."""
    ddf = smooth_field(shape, 4, [0.5 * limit for limit in limits], generator)
    ddf = ddf + smooth_field(shape, 8, [0.12 * limit for limit in limits], generator)
    largest = ddf.flatten(2).abs().amax(dim=2).reshape([1, -1] + [1] * len(shape))
    bound = torch.tensor(limits).reshape(largest.shape)
    return ddf * (bound / largest.clamp(min=1e-6)).clamp(max=1.0)


def synthetic_pair(
    shape: Sequence[int],
    generator: np.random.Generator,
    max_shift: int | Sequence[int] | None = None,
    kind: str = "labels",
    deformation: float = 0.08,
) -> dict[str, torch.Tensor]:
    """Make two images of one random anatomy, each deformed and shifted on its own.

    One anatomy is drawn and painted once; each image is that anatomy under its own random smooth warp, then moved by
    its own whole-voxel shift, so the background stays exactly 0 and no content touches the border.

    Args:
        shape: voxels along each axis, 2D or 3D.
        generator: source of the randomness.
        max_shift: largest shift along an axis, voxels, one number or one per axis; a twelfth of the size if left out.
        kind: "labels" (12 to 20 textured regions), "vessels" (a branching tree, values 0 to 1) or "mixed" (either).
        deformation: largest displacement of each warp, as a fraction of the size along the axis.

    Returns:
        `moving` and `fixed`, float32 in [0, 1], `moving_label` and `fixed_label`, uint8, all `(1, *shape)`.

    Raises:
        ValueError: for an unknown kind, a shape that is not 2D or 3D, or too small for the shifts and warps, and for
            negative shifts or deformations.

    Example:
        >>> pair = synthetic_pair((48, 40), np.random.default_rng(0))
        >>> sorted(pair), pair["fixed"].shape
        (['fixed', 'fixed_label', 'moving', 'moving_label'], torch.Size([1, 48, 40]))
    """
    if kind not in KINDS or len(shape) not in (2, 3):
        raise ValueError(f"synthetic_pair expects a 2D or 3D shape and a kind of {KINDS}, got {list(shape)}, '{kind}'.")
    largest = [s // 12 for s in shape] if max_shift is None else max_shift
    shifts = [int(s) for s in per_axis(largest, len(shape), "max_shift")]
    if min(shifts) < 0 or deformation < 0:
        raise ValueError(f"synthetic_pair expects max_shift and deformation >= 0, got {max_shift} and {deformation}.")
    limits = [deformation * s for s in shape]
    margin = [s + math.ceil(limit) + 1 for s, limit in zip(shifts, limits)]
    vessels = kind == "vessels" or (kind == "mixed" and generator.random() < 0.5)
    if vessels:
        labels = vessel_tree(shape, generator, margin)
        image = labels.float()
    else:
        labels = label_map(shape, int(generator.integers(12, 21)), generator, margin)
        image = paint(labels, generator)
    pair: dict[str, torch.Tensor] = {}
    for side in ("moving", "fixed"):
        ddf = _bounded_field(shape, limits, generator)
        offsets = [int(generator.integers(-s, s + 1)) for s in shifts]
        clean = warp(image.unsqueeze(0), ddf, padding="zeros")[0]
        view = clean
        if not vessels:  # two scans of one anatomy never share their noise
            grain = torch.from_numpy(generator.standard_normal(clean.shape, dtype=np.float32))
            view = clean + float(generator.uniform(0.0, 0.02)) * grain
        # Rounding in the sampler leaves traces beside content: they are background.
        pair[side] = shift(_keep_content(view, clean > DARKEST / 2), offsets)
        pair[f"{side}_label"] = shift(warp(labels.unsqueeze(0), ddf, mode="nearest", padding="zeros")[0], offsets)
    return pair
