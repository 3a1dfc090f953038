"""What all pictures are drawn with: figures that need no display, overlays, grids, folds, outlines and notes.

A panel shows arrays `(right, up)`: the first array axis runs to the right of the picture, the second upwards.
matplotlib is imported when the first figure is made, and the state of `matplotlib.pyplot` is neither used nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DPI",
    "annotate",
    "checkerboard",
    "draw_folds",
    "draw_grid",
    "draw_outlines",
    "draw_scale",
    "empty_figure",
    "overlay",
    "percent",
    "show",
]

DPI = 150
_GRID_COLOR, _FOLD_COLOR = "#56b4e9", (1.0, 0.18, 0.18)  # light blue and red differ for every kind of color vision

# Where a note goes: position as a share of the panel, then points to the right and upwards, then its alignment.
_PLACES = {
    "left": (0, 0.5, 4, 0, "left", "center"),
    "right": (1, 0.5, -4, 0, "right", "center"),
    "bottom": (0.5, 0, 0, 4, "center", "bottom"),
    "top": (0.5, 1, 0, -4, "center", "top"),
    "corner": (0, 1, 4, -16, "left", "top"),  # below what is at the top
}

Range = tuple[float, float]
Extent = tuple[float, float, float, float]  # left, right, lower and upper edge


def empty_figure(width: float, height: float) -> Figure:
    """Make a white figure that is drawn off screen.

    Args:
        width: of the figure, inches.
        height: of the figure, inches.

    Returns:
        The figure, without any panel.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install matplotlib, or 'equireg[pictures]'.") from error
    figure = Figure(figsize=(width, height), facecolor="white", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def overlay(moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Color two gray images: moving in magenta, fixed in green, gray to white where they agree.

    Args:
        moving: `(right, up)`, 0 to 1.
        fixed: `(right, up)`, 0 to 1.

    Returns:
        Red, green and blue, `(right, up, 3)`.

    Example:
        >>> overlay(np.ones((1, 1)), np.zeros((1, 1))).tolist()
        [[[1.0, 0.0, 1.0]]]
    """
    return np.stack([moving, fixed, moving], axis=-1)


def checkerboard(
    even: np.ndarray,
    odd: np.ndarray,
    right: np.ndarray,
    up: np.ndarray,
    corner: Sequence[float] | np.ndarray,
    block: float,
) -> np.ndarray:
    """Mix two images in square blocks, as on a checkerboard.

    Args:
        even: image `(right, up)` shown in the block at the corner and in those it touches by a corner only.
        odd: image `(right, up)` shown in the blocks between.
        right: where the pixels lie along the first axis, any unit.
        up: where the pixels lie along the second axis.
        corner: lower left corner of one block.
        block: size of a block.

    Returns:
        The mixture, `(right, up)`.

    Example:
        >>> checkerboard(np.ones((4, 1)), np.zeros((4, 1)), np.arange(4.0), np.zeros(1), (0, 0), 2).tolist()
        [[1.0], [1.0], [0.0], [0.0]]
    """
    columns, rows = np.floor((right - corner[0]) / block), np.floor((up - corner[1]) / block)
    return np.where((columns[:, None] + rows[None]) % 2 == 0, even, odd)


def percent(share: float) -> str:
    """Write a share as a percentage that is never rounded to none or to all.

    Args:
        share: 0 to 1.

    Returns:
        The text, such as "0.12 %", "<0.01 %" or ">99.99 %".

    Example:
        >>> percent(1e-6), percent(0.5)
        ('<0.01 %', '50.00 %')
    """
    if 0 < share < 1e-4:
        return "<0.01 %"
    return f"{100 * share:.2f} %" if share < 0.99995 or share == 1 else ">99.99 %"


def show(panel: Axes, image: np.ndarray, title: str = "", extent: Extent | None = None) -> None:
    """Show an image in a panel without ticks, black where there is none.

    Args:
        panel: the panel.
        image: gray `(right, up)` or colors `(right, up, 3)`, 0 to 1.
        title: one or two lines above the panel.
        extent: left, right, lower and upper edge of the image in the panel's unit; pixel indices if left out.
    """
    options: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1} if image.ndim == 2 else {}
    panel.imshow(np.swapaxes(np.clip(image, 0, 1), 0, 1), origin="lower", extent=extent, **options)
    panel.set(xticks=[], yticks=[], facecolor="black")
    panel.spines[:].set_visible(False)
    if title:
        panel.set_title(title, fontsize=9)


def draw_grid(
    panel: Axes,
    coordinates: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    window: tuple[Range, Range],
    step: float,
) -> None:
    """Draw the lines on which a coordinate is a multiple of a step.

    Args:
        panel: the panel.
        coordinates: two arrays `(right, up)`, in the panel's unit, that would be `positions` if nothing were deformed.
        positions: where the columns `(right,)` and rows `(up,)` of these arrays lie, in the panel's unit.
        window: the lowest and highest position shown, to the right and upwards.
        step: distance of the lines where nothing is deformed.
    """
    if min(coordinates[0].shape) < 2:
        return
    for coordinate, (low, high) in zip(coordinates, window):
        # Lines from further than the window is wide are left out: a wild ddf would draw thousands.
        reach = high - low + step
        levels = step * np.arange(math.floor((low - reach) / step), math.ceil((high + reach) / step) + 1)
        levels = levels[(levels > coordinate.min()) & (levels < coordinate.max())]
        if levels.size:
            panel.contour(
                *positions, coordinate.T, levels=levels, colors=_GRID_COLOR, linewidths=0.7, linestyles="solid"
            )


def draw_folds(panel: Axes, cells: np.ndarray, start: Sequence[float], step: Sequence[float], smallest: float) -> None:
    """Fill the cells that fold in red, as an image with the gid "folds", if there are any.

    Args:
        panel: the panel.
        cells: `(right, up)`, True where a cell folds.
        start: lower left corner of the first cell, in the panel's unit.
        step: size of a cell to the right and upwards.
        smallest: size of the smallest mark that can be seen; smaller cells are drawn in blocks of at least that size,
            red if any of their cells folds.
    """
    if not cells.any():
        return
    factors = [max(1, math.ceil(smallest / size)) for size in step]
    padded = np.pad(cells, [(0, -have % factor) for have, factor in zip(cells.shape, factors)])
    columns, rows = (have // factor for have, factor in zip(padded.shape, factors))
    blocks = padded.reshape(columns, factors[0], rows, factors[1]).any(axis=(1, 3))
    colors = np.zeros((columns, rows, 4))
    colors[blocks] = (*_FOLD_COLOR, 1.0)
    ends = [low + size * have for low, size, have in zip(start, step, padded.shape)]
    extent = (start[0], ends[0], start[1], ends[1])
    image = panel.imshow(np.swapaxes(colors, 0, 1), origin="lower", extent=extent, interpolation="nearest", zorder=3)
    image.set_gid("folds")


def draw_outlines(panel: Axes, labels: np.ndarray, positions: Sequence[np.ndarray], color: str, style: str) -> None:
    """Draw a line around every label of a slice.

    Args:
        panel: the panel.
        labels: `(right, up)`, whole numbers, background 0.
        positions: where the columns `(right,)` and rows `(up,)` lie, in the panel's unit.
        color: of the lines.
        style: of the lines, such as "solid".
    """
    # A frame of background closes the lines of labels that reach the edge of the image.
    framed = np.pad(labels, 1)
    right, up = (_widened(at) for at in positions)
    for label in np.unique(labels[labels != 0]):
        inside = (framed == label).T.astype(float)
        panel.contour(right, up, inside, levels=[0.5], colors=color, linewidths=1.0, linestyles=style)


def _widened(positions: np.ndarray) -> np.ndarray:
    """Continue evenly spaced positions by one at either end."""
    step = positions[1] - positions[0] if len(positions) > 1 else 1.0
    return np.concatenate([[positions[0] - step], positions, [positions[-1] + step]])


def annotate(panel: Axes, text: str, place: str, size: float = 8) -> None:
    """Write on a panel, white with a dark edge, readable on any image.

    Args:
        panel: the panel.
        text: what to write.
        place: "left", "right", "bottom" or "top" for the middle of that edge, "corner" for the upper left corner below
            what is at the top.
        size: of the letters, points.
    """
    x, y, right, up, horizontal, vertical = _PLACES[place]
    panel.annotate(
        text,
        (x, y),
        xycoords="axes fraction",
        xytext=(right, up),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=size,
        color="white",
        zorder=5,
        path_effects=_dark_edge(2),
        parse_math=False,
    )


def draw_scale(panel: Axes, window: Sequence[Sequence[float]] | np.ndarray) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten millimeters into the lower left corner.

    Args:
        panel: the panel, in millimeters.
        window: the lowest and highest position shown, to the right and upwards.
    """
    (left, right), (low, high) = window
    length = round_length(0.3 * (right - left))
    x, y = left + 0.03 * (right - left), low + 0.04 * (high - low)
    bar: dict[str, Any] = {"color": "white", "linewidth": 2, "solid_capstyle": "butt", "zorder": 5}
    panel.plot([x, x + length], [y, y], path_effects=_dark_edge(3.5), **bar)
    panel.annotate(
        f"{length:g} mm",
        (x, y),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=7,
        color="white",
        zorder=5,
        path_effects=_dark_edge(2),
    )


def _dark_edge(width: float) -> list[Any]:
    """Return what makes a line or letters visible on any image."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="black")]


def round_length(most: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that is not larger than a positive length.

    Example:
        >>> round_length(37.0), round_length(0.99)
        (20.0, 0.5)
    """
    power = 10.0 ** math.floor(math.log10(most))
    return max(factor * power for factor in (0.5, 1.0, 2.0, 5.0) if factor * power <= most * (1 + 1e-9))
