"""Pictures by which a person judges a registration in two seconds.

`quality_figure` shows two images wherever in the world their grids lie, in millimeters; `registration_figure` shows
tensors as a network sees them, in voxels.

Pictures need matplotlib, which is imported when the first one is made. They are drawn off screen by an object of their
own each: no display is needed, and the state of `matplotlib.pyplot` is neither used nor changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ._panels import DPI, draw_folds, draw_grid, empty_figure, overlay, percent, show
from ._quality import quality_figure
from .atomic import written_whole
from .fields import identity_grid, jacobian_determinant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["quality_figure", "registration_figure", "save_figure"]

_HEIGHT, _GAP = 3.2, 0.1  # of a panel and between panels, inches
_LINES = 20  # of the grid, along the longer side of its panel
_CAPTION = "Overlays: moving magenta, fixed green, gray to white where they agree. Red cells of the grid fold."

# What a panel shows, in voxel indices: the lowest and highest index along its horizontal and its vertical axis.
_Window = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class _Plane:
    """The array axes a picture shows, and through which slices it cuts the others."""

    axes: tuple[int, int]  # to the right, upwards
    through: int | None  # the axis cut through, None in 2D
    fixed_slice: int
    moving_slice: int

    def cut(self, array: np.ndarray, index: int) -> np.ndarray:
        """Return the 2D slice of an array `(*spatial)`."""
        return array if self.through is None else array.take(index, axis=self.through)

    def name(self, image: torch.Tensor, index: int) -> str:
        """Return the shape of an image `(C, *spatial)` and which of its slices is shown."""
        shape = " x ".join(str(size) for size in image.shape[1:])
        return shape if self.through is None else f"{shape}, axis {self.through} at {index}"


def registration_figure(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    moved: torch.Tensor,
    ddf: torch.Tensor,
    spacing: Sequence[float] | None = None,
) -> Figure:
    """Draw moving, fixed, their overlay before and after registration, and the deformed grid with its folds.

    The first array axis shown runs to the right and the second upwards. Of 3D images one slice is shown: through the
    center of the content, across the axis with the fewest voxels (the last of several). The moving image is cut at the
    center of its own content where the grids differ or the fixed image's slice misses it. The overlay before
    registration puts equal voxel indices on each other. The grid is one painted on the moving image and carried along
    to the fixed one: the lines on which `x + ddf(x)`, less the mean displacement of the content, has a whole multiple
    of the spacing of lines as its coordinate. Red marks are the cells in which the ddf folds, those of both layers that
    touch a slice; their percentage is that of all cells of the ddf.

    Args:
        moving: `(C, *moving shape)`, 2D or 3D, background 0; the first channel is shown.
        fixed: `(C, *fixed shape)`, background 0; the shapes may differ.
        moved: `(C, *fixed shape)`, the moving image warped by the ddf.
        ddf: `(D, *fixed shape)`, voxels, from fixed to moving points.
        spacing: size of a voxel along each of the `D` axes, any unit, for the aspect; cubes if left out.

    Returns:
        The figure, for `save_figure`.

    Raises:
        ValueError: if shapes do not fit, a value is not finite, or a spacing is not positive.
        ImportError: if matplotlib is missing.

    Example:
        >>> disk = ((identity_grid([40, 32])[0] - 16).norm(dim=0, keepdim=True) < 9).float()
        >>> figure = registration_figure(disk, disk, disk, torch.zeros(2, 40, 32))
        >>> [axes.get_title().splitlines()[0] for axes in figure.axes]
        ['moving', 'fixed', 'before', 'after', 'deformed grid, folding 0.00 %']
    """
    steps = _checked_spacing(moving, fixed, moved, ddf, spacing)
    images = [image.detach().cpu().as_subclass(torch.Tensor) for image in (moving, fixed, moved)]
    field = ddf.detach().cpu().as_subclass(torch.Tensor).to(torch.promote_types(ddf.dtype, torch.float32))
    contents = [(image != 0).any(dim=0).numpy() for image in images]
    plane = _plane(contents[0], contents[1])
    slices = (plane.moving_slice, plane.fixed_slice, plane.fixed_slice)
    grays = [_brightness(image, like=images[k]) for image, k in zip(images, (0, 1, 0))]
    source, target, result = (plane.cut(gray, index) for gray, index in zip(grays, slices))
    seen = [plane.cut(content, index) for content, index in zip(contents, slices)]

    inside = torch.from_numpy(contents[1] if contents[1].any() else ~contents[1])
    mean = field[:, inside].mean(dim=1)
    mapped = (identity_grid(list(field.shape[1:]), dtype=field.dtype)[0] + field).movedim(0, -1) - mean
    coordinates = [plane.cut(mapped[..., axis].numpy(), plane.fixed_slice) for axis in plane.axes]
    cells = ~(jacobian_determinant(field.unsqueeze(0), scheme="forward")[0, 0] > 0)  # undefined counts as folded
    folds = _folds_beside(cells.numpy(), plane)

    aspect = steps[plane.axes[1]] / steps[plane.axes[0]]
    canvas = [max(sizes) for sizes in zip(source.shape, target.shape)]
    either = _on_canvas(seen[0], canvas) | _on_canvas(seen[1], canvas)
    near = _window(seen[1] | seen[2])
    windows = [_window(seen[0]), near, _window(either), near, near]
    axes, figure = _panels(windows, aspect)
    show(axes[0], source, f"moving\n{plane.name(moving, plane.moving_slice)}")
    show(axes[1], target, f"fixed\n{plane.name(fixed, plane.fixed_slice)}")
    before = overlay(_on_canvas(source, canvas), _on_canvas(target, canvas))
    show(axes[2], before, "before\nmoving and fixed")
    show(axes[3], overlay(result, target), "after\nmoved and fixed")
    shift = ", ".join(f"{value:.1f}" for value in mean.tolist())
    folding = percent(cells.double().mean().item())
    show(axes[4], 0.6 * result, f"deformed grid, folding {folding}\nmean shift ({shift}) removed")
    positions = [np.arange(size) for size in coordinates[0].shape]
    step = max(1, round(max(high - low for low, high in near) / _LINES))
    draw_grid(axes[4], coordinates, positions, near, step)
    smallest = 2 / 72 * max(1, aspect) * (near[1][1] - near[1][0] + 1) / _HEIGHT  # two points, in voxels
    draw_folds(axes[4], folds, (0, 0), (1, 1), smallest)
    for panel, ((left, right), (low, high)) in zip(axes, windows):
        panel.set(xlim=(left - 0.5, right + 0.5), ylim=(low - 0.5, high + 0.5), aspect=aspect)
    figure.text(0.5, 0.12 / figure.get_figheight(), _CAPTION, ha="center", fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a file that appears only when complete.

    Args:
        figure: what `quality_figure` or `registration_figure` returned.
        path: file to write, in a folder that exists; its ending says the format, such as `.png`, `.pdf` or `.svg`.

    Returns:
        The path written.

    Raises:
        ValueError: if the ending is no known format or the folder does not exist.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in known or not path.parent.is_dir():
        raise ValueError(
            f"save_figure expects a path in a folder that exists, ending in one of {', '.join(sorted(known))}, "
            f"got '{path}'."
        )
    with written_whole(path, "picture") as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI)
    return path


def _checked_spacing(
    moving: torch.Tensor, fixed: torch.Tensor, moved: torch.Tensor, ddf: torch.Tensor, spacing: Sequence[float] | None
) -> list[float]:
    """Return a spacing for each axis, after checking that all arguments fit each other."""
    dims = ddf.dim() - 1
    given = f"moving {list(moving.shape)}, fixed {list(fixed.shape)}, moved {list(moved.shape)}, ddf {list(ddf.shape)}"
    grids = fixed.shape[1:] == moved.shape[1:] == ddf.shape[1:] and moving.dim() == ddf.dim()
    if dims not in (2, 3) or ddf.shape[0] != dims or not grids or 0 in (*moving.shape, *fixed.shape, *moved.shape):
        raise ValueError(
            "registration_figure expects moving (C, *spatial), and fixed and moved (C, *spatial) on the grid of a ddf "
            f"(D, *spatial) with D = 2 or 3, got {given}."
        )
    for name, tensor in {"moving": moving, "fixed": fixed, "moved": moved, "ddf": ddf}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"registration_figure expects finite values, got NaN or infinity in {name}.")
    steps = [1.0] * dims if spacing is None else [float(step) for step in spacing]
    if len(steps) != dims or not all(0 < step < float("inf") for step in steps):
        raise ValueError(f"registration_figure expects {dims} positive spacings, got {spacing}.")
    return steps


def _box(content: np.ndarray) -> list[tuple[int, int]]:
    """Return the lowest and highest index of the content along each axis; all indices if there is none."""
    if not content.any():
        return [(0, size - 1) for size in content.shape]
    return [(int(hits.min()), int(hits.max())) for hits in np.nonzero(content)]


def _plane(moving: np.ndarray, fixed: np.ndarray) -> _Plane:
    """Choose the slices to show from the content of the two images."""
    if fixed.ndim == 2:
        return _Plane((0, 1), None, 0, 0)
    through = min(range(3), key=lambda axis: (fixed.shape[axis], -axis))
    middle_moving, middle_fixed = (sum(_box(content)[through]) // 2 for content in (moving, fixed))
    first, second = (axis for axis in range(3) if axis != through)
    shared = moving.shape == fixed.shape and moving.take(middle_fixed, axis=through).any()
    return _Plane((first, second), through, middle_fixed, middle_fixed if shared else middle_moving)


def _brightness(image: torch.Tensor, like: torch.Tensor) -> np.ndarray:
    """Scale the first channel of an image to 0 to 1 by percentiles of another's content; `(*spatial)`."""
    values, reference = image[0].double().numpy(), like[0].double().numpy()
    content = reference[reference != 0]
    if content.size == 0:
        return np.zeros_like(values)
    low, high = np.percentile(content, [0.5, 99.5])
    low = min(0.0, low)  # without negative values, 0 is black
    return np.where(values == 0, 0.0, np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0))


def _window(content: np.ndarray) -> _Window:
    """Return the box around the content of a 2D image, with some margin."""
    ranges = []
    for (low, high), size in zip(_box(content), content.shape):
        margin = max(2, round(0.06 * (high - low)))
        ranges.append((max(0, low - margin), min(size - 1, high + margin)))
    return ranges[0], ranges[1]


def _on_canvas(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Put a 2D image on a larger canvas of background, voxel indices unchanged."""
    return np.pad(image, [(0, size - have) for size, have in zip(shape, image.shape)])


def _folds_beside(cells: np.ndarray, plane: _Plane) -> np.ndarray:
    """Return which cells of the layers that touch a slice fold, 2D."""
    if plane.through is None:
        return cells
    last = cells.shape[plane.through] - 1
    layers = [min(max(plane.fixed_slice - 1, 0), last), min(plane.fixed_slice, last)]
    return np.logical_or(*(cells.take(layer, axis=plane.through) for layer in layers))


def _panels(windows: Sequence[_Window], aspect: float) -> tuple[list[Axes], Figure]:
    """Make a row of empty panels, each as wide as its window demands."""
    ratios = [(x[1] - x[0] + 1) / (aspect * (y[1] - y[0] + 1)) for x, y in windows]
    widths = [_HEIGHT * min(max(ratio, 0.8), 2.5) for ratio in ratios]
    # Inches from the left and from below: titles need half an inch, the caption a third.
    width, height = sum(widths) + _GAP * (len(widths) + 1), _HEIGHT + 0.85
    figure = empty_figure(width, height)
    lefts = [sum(widths[:k]) + _GAP * (k + 1) for k in range(len(widths))]
    boxes = [(left / width, 0.35 / height, size / width, _HEIGHT / height) for left, size in zip(lefts, widths)]
    return [figure.add_axes(box) for box in boxes], figure
