"""The picture of a registration of two files: three planes, before and after, in millimeters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch

from ._panels import (
    annotate,
    checkerboard,
    draw_folds,
    draw_grid,
    draw_outlines,
    draw_scale,
    empty_figure,
    overlay,
    percent,
    round_length,
    show,
)
from ._views import GrayImage, View, fold_share, folds, rigid_part, shared_limits, square_affine, views
from .fields import full_precision
from .spaces import same_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from monai.data import MetaTensor

__all__ = ["quality_figure"]

_WIDTH, _GAP, _SIDE = 3.6, 0.06, 0.3  # of a panel, between panels, and left of them for the plane's name; inches
_RATIOS = 0.45, 1.0  # lowest and highest ratio of a panel's height to its width
_PIXELS = 540  # across a panel, as it is saved
_SMALLEST = 1 / 6  # of a panel that an image takes at least, unless both are put side by side
_BLOCKS, _LINES, _GRID_SAMPLES = 8, 12, 400  # across a panel: checkerboard, grid lines at least, field at most
_MOVED_COLOR, _FIXED_COLOR = "#ffb000", "#41d9ff"  # of outlines: orange and light blue


@dataclass(frozen=True)
class _Pair:
    """All that the panels of one figure show."""

    moving: GrayImage
    fixed: GrayImage
    moved: GrayImage
    field: torch.Tensor
    labels: tuple[torch.Tensor | None, torch.Tensor | None]  # moved, fixed; (*shape)
    rotation: np.ndarray
    shift: np.ndarray


def quality_figure(
    moving: MetaTensor,
    fixed: MetaTensor,
    moved: MetaTensor,
    fixed_to_moving: MetaTensor,
    moved_label: torch.Tensor | None = None,
    fixed_label: torch.Tensor | None = None,
    title: str = "",
    lines: Sequence[str] = (),
    background: float | tuple[float, float] = 0.0,
) -> Figure:
    """Draw two images before and after registration, wherever in the world their grids lie.

    Each row is a plane through the center of the fixed image's content, along the axes of its grid; 2D images have one
    row. The columns are the overlay of moving and fixed image where they lie in the world; that of moved and fixed
    image; a checkerboard of these two; and the deformed grid. Overlays: moving is magenta, fixed green, and where they
    agree it is gray to white.

    - Right is the patient's right, up is anterior or superior, as letters at the edges say. 2D images are drawn like
      photographs, with x of ITK's coordinates to the right and y down, and without letters.
    - Before registration, a panel grows until it holds both images. Images so far apart that one of them would take
      less than a sixth of it are put side by side, each about its own center. Where a plane misses the moving content,
      the moving image is cut through its own center, parallel to the plane, and a note says how far away that is.
    - The grid is one painted on the moving image and carried along to the fixed one, less the rotation and the shift
      that fit the transform best, so that bending, scaling and shear are seen however the images were posed. Cells in
      which the transform folds are red, those of both layers that touch a slice; their percentage is that of all cells.

    Args:
        moving: `(C, *moving shape)`, 2D or 3D, on any grid; the first channel is shown.
        fixed: `(C, *fixed shape)`, on any grid.
        moved: `(C, *fixed shape)`, the moving image on the grid of the fixed one.
        fixed_to_moving: `(D, *fixed shape)`, displacement field, voxels of the fixed grid along its array axes.
        moved_label: `(1, *fixed shape)`, labels to outline in the overlay after registration.
        fixed_label: `(1, *fixed shape)`, labels to outline there.
        title: a heading, such as the names of the files.
        lines: further lines of text above the panels, such as measured numbers.
        background: value of voxels that hold nothing, of both images or of the moving and the fixed one. Brightness is
            scaled by percentiles of the other values, a peak of dark ones (air) left out; images on one scale that
            reaches below zero, such as Hounsfield units, share one range.

    Returns:
        The figure, for `equireg.pictures.save_figure`.

    Raises:
        ValueError: if an image carries no affine or an invalid one, shapes or grids do not fit, a value is not finite,
            or the background is not one or two finite numbers.
        ImportError: if matplotlib is missing.

    Example:
        >>> from monai.data import MetaTensor
        >>> image = MetaTensor(torch.rand(1, 9, 8, 7), affine=torch.eye(4))
        >>> figure = quality_figure(image, image, image, MetaTensor(torch.zeros(3, 9, 8, 7), affine=image.affine))
        >>> [panel.get_title().splitlines()[0] for panel in figure.axes[:4]]
        ['before', 'after', 'checkerboard', 'deformed grid, folding 0.00 %']
    """
    values = _backgrounds(background)
    _check(moving, fixed, moved, fixed_to_moving, moved_label, fixed_label)
    dims = fixed.dim() - 1
    affine, moving_affine = square_affine(fixed.affine, dims), square_affine(moving.affine, dims)
    source = GrayImage.of(moving, values[0], np.linalg.solve(moving_affine, affine))
    target = GrayImage.of(fixed, values[1], np.eye(dims + 1))
    source, target = shared_limits(source, target)
    result = GrayImage.of(moved, values[0], np.eye(dims + 1), like=source)
    field = full_precision(fixed_to_moving.detach().cpu().as_subclass(torch.Tensor))
    planes = views(affine, fixed.shape[1:], target.box)
    rotation, shift = rigid_part(field, planes[0].spacing, target.box)
    moved_outline, fixed_outline = (
        None if label is None else label.detach().cpu().as_subclass(torch.Tensor)[0]
        for label in (moved_label, fixed_label)
    )
    pair = _Pair(source, target, result, field, (moved_outline, fixed_outline), rotation, shift)

    near = [_margin(_union(_span(view, target), _span(view, result))) for view in planes]
    ratios = [min(max(_size(window)[1] / _size(window)[0], _RATIOS[0]), _RATIOS[1]) for window in near]
    windows = [_fit(window, ratio) for window, ratio in zip(near, ratios)]
    spacing_of_lines = round_length(max(_size(window).max() for window in near) / _LINES)
    caption = _caption(affine, dims, any(label is not None for label in pair.labels))
    figure, rows = _layout(planes, ratios, title, lines, caption)
    for view, window, panels in zip(planes, windows, rows):
        _draw_before(panels[0], view, pair, window)
        _draw_after(panels[1], panels[2], view, pair, window)
        _draw_field(panels[3], view, pair, window, spacing_of_lines)
        for panel in panels[:2]:
            for letter, place in zip(view.letters, ("left", "right", "bottom", "top")):
                annotate(panel, letter, place, 10)
    for panel, text in zip(rows[0], _titles(pair, affine, planes[0].spacing, spacing_of_lines)):
        panel.set_title(text, fontsize=9)
    return figure


def _backgrounds(background: float | tuple[float, float]) -> tuple[float, float]:
    """Return the background of the moving and of the fixed image."""
    given = background if isinstance(background, (tuple, list)) else (background, background)
    if len(given) != 2 or not all(isinstance(value, Real) and math.isfinite(value) for value in given):
        raise ValueError(f"quality_figure expects one background or two, finite numbers, got {background}.")
    return float(given[0]), float(given[1])


def _check(
    moving: MetaTensor,
    fixed: MetaTensor,
    moved: MetaTensor,
    fixed_to_moving: MetaTensor,
    moved_label: torch.Tensor | None,
    fixed_label: torch.Tensor | None,
) -> None:
    """Refuse arguments that do not fit each other."""
    from monai.data import MetaTensor  # not above: MONAI loads matplotlib, which is to wait for the first picture

    images = {"moving": moving, "fixed": fixed, "moved": moved, "fixed_to_moving": fixed_to_moving}
    for name, image in images.items():
        if not isinstance(image, MetaTensor):
            raise ValueError(
                f"quality_figure expects {name} to be a MetaTensor, whose affine places it in the world, "
                f"got {type(image).__name__}."
            )
    dims = fixed.dim() - 1
    labels = {"moved_label": moved_label, "fixed_label": fixed_label}
    on_grid: dict[str, torch.Tensor] = {"moved": moved, "fixed_to_moving": fixed_to_moving}
    on_grid.update((name, label) for name, label in labels.items() if label is not None)
    shapes = ", ".join(f"{name} {list(image.shape)}" for name, image in {**images, **on_grid}.items())
    fits = all(image.shape[1:] == fixed.shape[1:] for image in on_grid.values()) and moving.dim() == fixed.dim()
    if dims not in (2, 3) or not fits or fixed_to_moving.shape[0] != dims or 0 in (*moving.shape, *fixed.shape):
        raise ValueError(
            "quality_figure expects moving (C, *spatial) and, on one other grid, fixed and moved (C, *spatial), "
            f"fixed_to_moving (D, *spatial) and labels (1, *spatial), with D = 2 or 3, got {shapes}."
        )
    for name, image in images.items():
        low, high = torch.aminmax(image.detach().as_subclass(torch.Tensor))
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ValueError(f"quality_figure expects finite values, got NaN or infinity in {name}.")
    same_axes(moving.affine, fixed.affine, dims)  # refuses affines that are not invertible
    corners = np.indices((2,) * dims).reshape(dims, -1) * (np.array(fixed.shape[1:])[:, None] - 1)
    for name in ("moved", "fixed_to_moving"):
        found = square_affine(images[name].affine, dims)
        off = np.linalg.solve(square_affine(fixed.affine, dims), found) - np.eye(dims + 1)
        if not np.abs(off[:dims] @ np.vstack([corners, np.ones(2**dims)])).max() < 0.01:
            raise ValueError(
                f"quality_figure expects {name} on the grid of fixed, with the affine {fixed.affine.tolist()}, "
                f"got {images[name].affine.tolist()}."
            )


def _size(window: np.ndarray) -> np.ndarray:
    """Return the width and height of a window: lowest and highest position to the right and upwards, `(2, 2)`."""
    return window[:, 1] - window[:, 0]


def _span(view: View, image: GrayImage) -> np.ndarray:
    """Return the window that holds the content of an image, seen along the normal of a plane; millimeters."""
    corners = view.on_plane(image.corners())
    return np.stack([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the window around two windows."""
    return np.stack([np.minimum(a[:, 0], b[:, 0]), np.maximum(a[:, 1], b[:, 1])], axis=1)


def _margin(window: np.ndarray) -> np.ndarray:
    """Return a window a little larger."""
    return window + 0.04 * _size(window).max() * np.array([-1, 1])


def _fit(window: np.ndarray, ratio: float) -> np.ndarray:
    """Widen a window about its center until its height is `ratio` times its width."""
    width, height = _size(window)
    size = np.array([max(width, height / ratio), max(height, width * ratio)])
    return window.mean(axis=1, keepdims=True) + 0.5 * size[:, None] * np.array([-1, 1])


def _raster(view: View, window: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return positions that cover a window, and their distance, to the right and upwards.

    Every voxel center of the fixed grid is one of them, unless voxels are much smaller than pixels.
    """
    pixel = _size(window)[0] / pixels
    positions, steps = [], []
    for step, (low, high) in zip(view.step, window):
        parts = max(1, 2 * round((step / pixel - 1) / 2) + 1)  # odd: one of them is the center of the voxel
        step = max(step / parts, pixel / 3)
        positions.append(step * np.arange(math.floor(low / step), math.ceil(high / step) + 1))
        steps.append(step)
    return positions[0], positions[1], (steps[0], steps[1])


def _extent(right: np.ndarray, up: np.ndarray, steps: tuple[float, float]) -> tuple[float, float, float, float]:
    """Return the edges of a raster: left, right, lower, upper."""
    return (
        right[0] - steps[0] / 2,
        right[-1] + steps[0] / 2,
        up[0] - steps[1] / 2,
        up[-1] + steps[1] / 2,
    )


def _frame(panel: Axes, window: np.ndarray) -> None:
    """Show exactly a window, which has the shape of the panel."""
    panel.set(xlim=window[0], ylim=window[1], aspect="auto")


def _draw_before(panel: Axes, view: View, pair: _Pair, near: np.ndarray) -> None:
    """Draw moving and fixed image where they lie in the world, or side by side if that is too far away."""
    ratio = _size(near)[1] / _size(near)[0]
    spans = _span(view, pair.fixed), _span(view, pair.moving)
    window = _fit(_margin(_union(*spans)), ratio)
    index, note = _moving_slice(view, pair.moving)
    apart = (spans[0][:, 0] > spans[1][:, 1]) | (spans[1][:, 0] > spans[0][:, 1])
    if apart.any() and min((_size(span) / _size(window)).max() for span in spans) < _SMALLEST:
        _draw_side_by_side(panel, view, pair, spans, index, ratio)
        offset = float(np.linalg.norm(spans[1].mean(axis=1) - spans[0].mean(axis=1)))
        note = "\n".join(filter(None, [f"side by side: {_millimeters(offset)} apart in this plane", note]))
    else:
        right, up, steps = _raster(view, window, _PIXELS)
        colors = overlay(pair.moving.at(view.points(right, up, index)), pair.fixed.at(view.points(right, up)))
        show(panel, colors, extent=_extent(right, up, steps))
        _frame(panel, window)
        draw_scale(panel, window)
    if note:
        annotate(panel, note, "corner")


def _moving_slice(view: View, moving: GrayImage) -> tuple[float | None, str]:
    """Return where to cut the moving image, as a fixed index, and a note if that is not the plane of the view."""
    if view.through is None:
        return None, ""
    corners = moving.corners()[view.through]
    if corners.min() <= view.index <= corners.max():
        return float(view.index), ""
    center = float(corners.mean())
    distance = (center - view.index) * view.spacing[view.through]
    return center, f"moving image cut {_millimeters(abs(distance))} further {view.ends[int(distance > 0)]}"


def _draw_side_by_side(
    panel: Axes, view: View, pair: _Pair, spans: Sequence[np.ndarray], index: float | None, ratio: float
) -> None:
    """Draw the fixed image in the left half of a panel and the moving one in the right half, on one scale."""
    center, other = (span.mean(axis=1, keepdims=True) for span in spans)
    size = np.maximum(*(_size(span) for span in spans))
    half = _fit(_margin(center + 0.5 * size[:, None] * np.array([-1, 1])), 2 * ratio)
    right, up, steps = _raster(view, half, _PIXELS // 2)
    target = pair.fixed.at(view.points(right, up))
    source = pair.moving.at(view.points(right + (other - center)[0], up + (other - center)[1], index))
    empty = np.zeros_like(target)
    left, end, low, high = _extent(right, up, steps)
    window = np.array([[left, 2 * end - left], half[1]])
    colors = np.concatenate([overlay(empty, target), overlay(source, empty)])
    show(panel, colors, extent=(left, window[0, 1], low, high))
    panel.axvline(end, color="white", linewidth=1)
    _frame(panel, window)
    draw_scale(panel, window)


def _draw_after(after: Axes, mixed: Axes, view: View, pair: _Pair, window: np.ndarray) -> None:
    """Draw the overlay and the checkerboard of moved and fixed image."""
    right, up, steps = _raster(view, window, _PIXELS)
    points, extent = view.points(right, up), _extent(right, up, steps)
    result, target = pair.moved.at(points), pair.fixed.at(points)
    show(after, overlay(result, target), extent=extent)
    styles = ((_MOVED_COLOR, "solid"), (_FIXED_COLOR, "dashed"))
    for label, (color, style) in zip(pair.labels, styles):
        if label is not None:
            draw_outlines(after, view.cut(label).numpy(), view.positions(), color, style)
    block = _size(window).max() / _BLOCKS
    show(mixed, checkerboard(target, result, right, up, window[:, 0], block), extent=extent)
    for panel in (after, mixed):
        _frame(panel, window)
    draw_scale(after, window)


def _draw_field(panel: Axes, view: View, pair: _Pair, window: np.ndarray, spacing_of_lines: float) -> None:
    """Draw the deformed grid over the moved image, and the cells that fold."""
    right, up, steps = _raster(view, window, _PIXELS)
    show(panel, 0.5 * pair.moved.at(view.points(right, up)), extent=_extent(right, up, steps))
    # A picture has room for some hundred samples: lines are as straight between two of them as can be seen.
    strides = [math.ceil(pair.field.shape[1 + axis] / _GRID_SAMPLES) for axis in view.axes]
    columns, rows = (at[::stride] for at, stride in zip(view.positions(), strides))
    spacing = np.array(view.spacing).reshape(-1, 1, 1)
    displacement = view.cut(pair.field)[:, :: strides[0], :: strides[1]].double().numpy()
    mapped = (view.points(columns, rows) + displacement) * spacing - pair.shift.reshape(-1, 1, 1)
    straight = np.einsum("ji,j...->i...", pair.rotation, mapped) / spacing
    coordinates = view.on_plane(straight)
    bounds = (tuple(window[0]), tuple(window[1]))
    draw_grid(panel, list(coordinates), (columns, rows), bounds, spacing_of_lines)
    cells, start = _folded_cells(view, pair.field)
    draw_folds(panel, cells, start, view.step, 2 * _size(window)[0] / _PIXELS)
    _frame(panel, window)


def _folded_cells(view: View, field: torch.Tensor) -> tuple[np.ndarray, list[float]]:
    """Return which cells beside a plane fold, `(right, up)`, and the lower left corner of the first, millimeters."""
    layers = field
    if view.through is not None:
        first = max(view.index - 1, 0)
        last = min(view.index + 1, view.shape[view.through] - 1)
        layers = view.layers(field, first, last - first + 1)
    cells = folds(layers)
    cells = cells if view.through is None else cells.any(dim=view.through)
    # Cells start at a voxel center; an axis of one voxel has none to start at.
    start = [0.0 if view.shape[axis] > 1 else -step / 2 for axis, step in zip(view.axes, view.step)]
    return view.turn(cells).numpy(), start


def _millimeters(length: float) -> str:
    return f"{length:.1f} mm" if length < 100 else f"{length:.0f} mm"


def _titles(pair: _Pair, affine: np.ndarray, spacing: Sequence[float], spacing_of_lines: float) -> list[str]:
    """Return two lines for each column."""
    centers = [image.corners().mean(axis=1) for image in (pair.moving, pair.fixed)]
    dims = len(spacing)
    distance = float(np.linalg.norm(affine[:dims, :dims] @ (centers[0] - centers[1])))
    middle = pair.fixed.box.mean(axis=0) * np.array(spacing)
    shift = float(np.linalg.norm(pair.rotation @ middle + pair.shift - middle))
    cosine = (np.trace(pair.rotation) - 1) / 2 if dims == 3 else pair.rotation[0, 0]
    angle = math.degrees(math.acos(min(max(float(cosine), -1.0), 1.0)))
    return [
        f"before\ncenters of the contents {_millimeters(distance)} apart",
        "after\nmoved and fixed",
        "checkerboard\nmoved and fixed",
        f"deformed grid, folding {percent(fold_share(pair.field))}\n"
        f"{spacing_of_lines:g} mm lines; shift {_millimeters(shift)}, turn {angle:.1f}° removed",
    ]


def _caption(affine: np.ndarray, dims: int, outlined: bool) -> str:
    """Say what the colors and the directions mean."""
    text = ["Overlays: moving magenta, fixed green, gray to white where they agree. Red cells of the grid fold."]
    if outlined:
        text.append("Outlines: moved label orange, fixed label light blue and dashed.")
    if dims == 2:
        text.append("Right: x of ITK's coordinates (LPS), down: y, as photographs are stored.")
    else:
        text.append("Right: patient's right (R) or anterior (A); up: anterior (A) or superior (S).")
    axes = affine[:dims, :dims] / np.linalg.norm(affine[:dims, :dims], axis=0)
    turned = math.degrees(math.acos(min(float(np.abs(axes).max(axis=0).min()), 1.0)))
    if turned > 0.5:
        text.append(f"The fixed grid is oblique, by up to {turned:.0f}°: the planes follow its axes.")
    return "\n".join(textwrap.wrap(" ".join(text), 190))


def _layout(
    planes: Sequence[View], ratios: Sequence[float], title: str, lines: Sequence[str], caption: str
) -> tuple[Figure, list[list[Axes]]]:
    """Make a row of four empty panels for each plane, with all text but the titles of the columns."""
    side = _SIDE if any(view.name for view in planes) else _GAP
    width = side + 4 * (_WIDTH + _GAP)
    heading = textwrap.wrap(title, 130)
    numbers = [part for line in lines for part in textwrap.wrap(line, 170)]
    top = 0.1 + 0.26 * len(heading) + 0.22 * len(numbers) + 0.45
    bottom = 0.12 + 0.17 * (caption.count("\n") + 1)
    heights = [_WIDTH * ratio for ratio in ratios]
    height = top + sum(heights) + _GAP * len(heights) + bottom
    figure = empty_figure(width, height)
    edge = height - 0.1
    for texts, step, style in ((heading, 0.26, {"fontsize": 13, "weight": "bold"}), (numbers, 0.22, {"fontsize": 11})):
        for text in texts:
            figure.text(side / width, edge / height, text, va="top", parse_math=False, **style)
            edge -= step
    figure.text(0.5, 0.06 / height, caption, ha="center", va="bottom", fontsize=8)
    edge, rows = height - top, []
    for view, tall in zip(planes, heights):
        edge -= tall
        lefts = [side + column * (_WIDTH + _GAP) for column in range(4)]
        rows.append([figure.add_axes((x / width, edge / height, _WIDTH / width, tall / height)) for x in lefts])
        middle = (edge + tall / 2) / height
        figure.text(0.5 * side / width, middle, view.name, rotation=90, ha="center", va="center", fontsize=10)
        edge -= _GAP
    return figure, rows
