"""How a trained network's answer and its overlap hold out while one image is shifted or turned: rows, table, picture.

Where equivariance is exact, error and Dice are flat; where it is learned, or absent, the curve says how far it goes.
`measure` does it all for weights by name, as the command `equireg equivariance` does.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Resized, ResizeWithPadOrCropd
from monai.utils import convert_to_tensor

from .augmentation import RandWarpPaird
from .data import PairDataset, SyntheticPairDataset, WarpedPairDataset
from .equivariance import Cropped, Network, error_map
from .fields import identity_grid, warp
from .lists import decathlon_subjects, image_files
from .moves import AffineMove, read_at, rotation, still, translation, turn_angle
from .networks.active import content_box, shift_grid
from .pictures import save_figure
from .transforms import NormalizeContentd
from .weights import load_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ANGLES", "SHIFTS", "curve_figure", "equivariance_curve", "measure", "summarize", "held_out_pairs"]

Pair = Mapping[str, torch.Tensor]
Row = dict[str, Any]

SHIFTS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # voxels
ANGLES = (0, 5, 10, 15, 20, 30, 45, 60, 90, 120, 150, 180)  # degrees
THRESHOLD = 0.2  # of masks that have no labels beside them, as in the paper
RETINA = (
    ("retina_chase28/observer1/*.png", "retina_hrf/*.png"),
    r"(Image_\d+|\d+_[a-z]+)",
)  # files, and whose they are


def _overlap(moved: torch.Tensor, fixed: torch.Tensor, labels: bool) -> float:
    """Return Dice of two images `(1, 1, *shape)`: the mean over labels, or of what exceeds `THRESHOLD`."""
    if not labels:
        return float(compute_dice(moved > THRESHOLD, fixed > THRESHOLD))
    classes = int(max(moved.max(), fixed.max())) + 1
    scores = compute_dice(one_hot(moved, classes), one_hot(fixed, classes), include_background=False)
    return float(scores.nanmean())


def _cropped(pair: Pair, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Crop each side of a pair to its content, `(1, 1, *content shape)`; labels are cropped along."""
    result: dict[str, torch.Tensor] = {}
    for key in keys:
        first, last = content_box(torch.as_tensor(pair[key.removesuffix("_label")])[None])
        result[key] = shift_grid(torch.as_tensor(pair[key])[None], first, (last - first + 1)[0].tolist(), "zeros")
    return result


def _canvas(image: torch.Tensor, kind: str, room: int) -> torch.Tensor:
    """Put an image cropped to its content on a canvas that holds it at every amount."""
    shape = list(image.shape[2:])
    if kind == "shift":
        return translation([0] * len(shape), [shape[0] + room, *shape[1:]]).image(image)
    # A square turns onto itself by quarters, voxel onto voxel; off its center by half a voxel, content needs one more.
    side = math.ceil(math.hypot(*shape[:2])) + 2
    start = [(side - n) // 2 for n in shape[:2]] + [0] * (len(shape) - 2)
    return translation(start, [side, side, *shape[2:]]).image(image)


def _move(kind: str, amount: float, shape: Sequence[int]) -> AffineMove:
    """Return the move of an image on its canvas, which stays."""
    if kind == "shift":
        return translation([amount] + [0] * (len(shape) - 1), shape)
    return rotation(turn_angle(amount, len(shape)), shape, shape)


def _brought_back(answer: torch.Tensor, moving: AffineMove, fixed: AffineMove, shape: Sequence[int]) -> torch.Tensor:
    """Return a ddf between moved images as one between the images as they were, `(1, D, *old fixed shape)`.

    Overlap then needs no moved labels: one that is moved by half a voxel is rounded by as much.
    """
    grid = identity_grid(list(shape), torch.float64, answer.device)
    points = fixed.to_new(grid)
    return moving.to_old(points + read_at(answer, points)) - grid


@torch.no_grad()
def equivariance_curve(
    network: Network,
    pairs: Sequence[Pair],
    amounts: Sequence[float],
    kind: str = "shift",
    side: str = "moving",
) -> list[Row]:
    """Measure error and overlap while one image, or both alike, move further and further.

    Each image is first cropped to its content and put on a canvas that holds it at every amount. Errors are those of
    `equireg.equivariance.error_map`, over the voxels of the fixed content; overlap is that of the images as they were,
    under the answer brought back to them. Moves by fractions of a voxel, and turns by other than quarters, interpolate
    the image: their error is that of the network on blurred content.

    Args:
        network: called `network(moving, fixed)` with batches of one.
        pairs: each with `moving` and `fixed`, `(C, *shape)`, background 0, and, for overlap of labels instead of masks,
            `moving_label` and `fixed_label`, `(1, *shape)`, integers.
        amounts: how far: voxels along the first axis, or degrees in the plane of the first two.
        kind: "shift" or "angle".
        side: "moving", "fixed" or "both".

    Returns:
        A row per pair and amount: `kind`, `side`, `amount`, `pair`, `error_mean` and `error_max` in voxels, `dice`.

    Raises:
        ValueError: for another kind or side.

    Example:
        >>> from equireg.networks import CoordinateAttention
        >>> pair = {"moving": torch.rand(1, 9, 8), "fixed": torch.rand(1, 9, 8)}
        >>> rows = equivariance_curve(CoordinateAttention(2, feature_channels=8).eval(), [pair], [0, 3])
        >>> [row["amount"] for row in rows], max(row["error_max"] for row in rows) < 1e-3
        ([0, 3], True)
    """
    if kind not in ("shift", "angle") or side not in ("moving", "fixed", "both"):
        raise ValueError(f"kind must be shift or angle and side moving, fixed or both, got {kind!r} and {side!r}.")
    rows: list[Row] = []
    room = math.ceil(max(amounts)) if kind == "shift" else 0
    for index, pair in enumerate(pairs):
        labels = "moving_label" in pair
        keys = ("moving", "fixed", *(("moving_label", "fixed_label") if labels else ()))
        placed = {key: _canvas(image, kind, room) for key, image in _cropped(pair, keys).items()}
        ddf = network(placed["moving"], placed["fixed"])
        for amount in amounts:
            shapes = {name: placed[name].shape[2:] for name in ("moving", "fixed")}
            moves = {
                name: _move(kind, amount, shape) if side in (name, "both") else still(shape)
                for name, shape in shapes.items()
            }
            moved = {name: moves[name].image(placed[name]) for name in shapes}
            answer = network(moved["moving"], moved["fixed"])
            errors = error_map(network, placed["moving"], placed["fixed"], moves["moving"], moves["fixed"], ddf, answer)
            inside = errors[(moved["fixed"] != 0).any(dim=1)]
            inside = inside[~inside.isnan()]
            ends = ("moving_label", "fixed_label") if labels else ("moving", "fixed")
            back = _brought_back(answer, moves["moving"], moves["fixed"], placed["fixed"].shape[2:])
            result = warp(placed[ends[0]], back, mode="nearest" if labels else "linear", padding="zeros")
            rows.append(
                {
                    "kind": kind,
                    "side": side,
                    "amount": amount,
                    "pair": index,
                    "error_mean": inside.mean().item(),
                    "error_max": inside.max().item(),
                    "dice": _overlap(result, placed[ends[1]], labels),
                }
            )
    return rows


def held_out_pairs(spatial_dims: int, dataset_dir: str | Path = "", count: int = 4, seed: int = 0) -> list[Pair]:
    """Return pairs that no shipped weights were trained on.

    Args:
        spatial_dims: 2 or 3.
        dataset_dir: empty for synthetic vessels (2D) or label maps (3D); a folder in the layout of the Medical
            Segmentation Decathlon, of which test subjects are paired, with labels; or a folder of retinal vessel masks
            (`retina_chase28/observer1/*.png`, `retina_hrf/*.png`), of which test eyes are warped.
        count: number of pairs.
        seed: of the pairs.

    Returns:
        `count` mappings with `moving` and `fixed`, and labels where there are any.

    Raises:
        ValueError: if the folder holds neither.

    Example:
        >>> [pair] = held_out_pairs(2, count=1)
        >>> pair["moving"].shape
        torch.Size([1, 96, 96])
    """
    normalize = NormalizeContentd(("moving", "fixed"))
    data: Any
    if not dataset_dir:
        kind, shape = ("vessels", (96, 96)) if spatial_dims == 2 else ("labels", (40, 48, 40))
        data = SyntheticPairDataset(spatial_dims, shape, count, seed, normalize, kind=kind)
        keys = ("moving", "fixed") if spatial_dims == 2 else ("moving", "fixed", "moving_label", "fixed_label")
    elif (Path(dataset_dir) / "dataset.json").is_file():
        loading = [LoadImaged(("image", "label")), EnsureChannelFirstd(("image", "label"))]
        load = Compose([*loading, Orientationd(("image", "label"), axcodes="RAS", labels=None)])
        data = PairDataset(decathlon_subjects(dataset_dir, "test"), load, normalize, count, seed)
        keys = ("moving", "fixed", "moving_label", "fixed_label")
    else:
        load = Compose(
            [
                LoadImaged("image"),
                EnsureChannelFirstd("image"),
                Resized("image", 96, size_mode="longest", mode="area"),
                ResizeWithPadOrCropd("image", (112, 112)),
            ]
        )
        eyes = image_files(dataset_dir, *RETINA, split="test")
        data = WarpedPairDataset(eyes, RandWarpPaird(), load, normalize, count, seed)
        keys = ("moving", "fixed")
    return [
        {key: convert_to_tensor(item[key], track_meta=False) for key in keys}
        for item in map(data.__getitem__, range(count))
    ]


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return mean and spread over pairs, a row per kind, side and amount.

    Args:
        rows: what `equivariance_curve` returned, of any kinds and sides.

    Returns:
        Rows with `kind`, `side`, `amount`, `pairs`, `error_mean` (mean of means), `error_max` (largest), `dice` and
        `dice_sd`.

    Example:
        >>> row = {"kind": "shift", "side": "moving", "amount": 1, "pair": 0, "error_mean": 0.0, "error_max": 0.0}
        >>> summarize([{**row, "dice": 0.5}, {**row, "dice": 0.7}])[0]["dice"]
        0.6
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["side"], row["amount"]), []).append(row)
    return [
        {
            **dict(zip(("kind", "side", "amount"), key)),
            "pairs": len(group),
            "error_mean": float(np.mean([row["error_mean"] for row in group])),
            "error_max": float(np.max([row["error_max"] for row in group])),
            "dice": float(np.mean([row["dice"] for row in group])),
            "dice_sd": float(np.std([row["dice"] for row in group], ddof=1)) if len(group) > 1 else float("nan"),
        }
        for key, group in groups.items()
    ]


def curve_figure(curves: Mapping[str, Sequence[Row]], title: str = "") -> Figure:
    """Draw error and Dice against shift and angle.

    Args:
        curves: a name for the legend to the rows of `equivariance_curve`; kinds and sides may be mixed.
        title: written above.

    Returns:
        A matplotlib figure, for `equireg.pictures.save_figure`.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib") from error
    means = {name: summarize(rows) for name, rows in curves.items()}
    kinds = [kind for kind in ("shift", "angle") if any(row["kind"] == kind for rows in means.values() for row in rows)]
    figure = Figure(figsize=(4.6 * len(kinds), 5.4), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for column, kind in enumerate(kinds):
        for name, rows in means.items():
            for side in dict.fromkeys(row["side"] for row in rows if row["kind"] == kind):
                chosen = sorted((r for r in rows if (r["kind"], r["side"]) == (kind, side)), key=lambda r: r["amount"])
                # Fractions of a voxel are another matter than whole ones: crosses, joined by no line.
                whole = [row for row in chosen if float(row["amount"]).is_integer()]
                parts = [row for row in chosen if row not in whole]
                for part, style in ((whole, {"marker": "."}), (parts, {"marker": "x", "linestyle": ""})):
                    amounts = [row["amount"] for row in part]
                    # A logarithmic axis has no place for zero; below rounding nothing is told apart.
                    distances = [max(row["error_mean"], 1e-7) for row in part]
                    label = (f"{name}, {side}" if name else side) if part is whole else None
                    color = None if part is whole else panels[0, column].lines[-1].get_color()
                    panels[0, column].semilogy(amounts, distances, label=label, color=color, **style)
                    panels[1, column].plot(amounts, [row["dice"] for row in part], label=label, color=color, **style)
        panels[1, column].set(xlabel={"shift": "shift, voxels", "angle": "angle, degrees"}[kind], ylim=(0, 1))
        panels[0, column].set(title=f"against {kind}", ylim=(5e-8, None))
    panels[0, 0].set(ylabel="equivariance error, voxels (mean)")
    panels[1, 0].set(ylabel="Dice")
    panels[1, 0].legend(fontsize=8)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def measure(
    weights: str | Path = "vessels",
    dataset_dir: str | Path = "",
    output_dir: str | Path | None = None,
    pairs: int = 4,
    shifts: Sequence[float] = SHIFTS,
    angles: Sequence[float] = ANGLES,
    sides: Sequence[str] = ("moving", "fixed"),
    crop: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Measure equivariance of trained weights against shift and angle, print the curve, and draw it.

    Args:
        weights: name of shipped weights, or a file that training wrote.
        dataset_dir: images to measure on, see `held_out_pairs`; synthetic ones if empty.
        output_dir: where `equivariance.csv` and `equivariance.png` go; nothing is written if left out.
        pairs: number of pairs.
        shifts: voxels, along the first axis.
        angles: degrees, in the plane of the first two axes.
        sides: which image moves: "moving", "fixed", "both".
        crop: run the network on the content of each image, as files are registered, instead of the whole canvas.
        seed: of the pairs.
        device: where the network runs.

    Returns:
        The summary, see `summarize`.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: as `load_network`, `held_out_pairs` and `equivariance_curve`.
    """
    network = load_network(weights, device)
    chosen: list[Pair] = [
        {key: value.to(device) for key, value in pair.items()}
        for pair in held_out_pairs(network.spatial_dims, dataset_dir, pairs, seed)
    ]
    called = Cropped(network) if crop else network
    rows: list[Row] = []
    for kind, amounts in (("shift", shifts), ("angle", angles)):
        for side in sides if amounts else ():
            rows += equivariance_curve(called, chosen, amounts, kind, side)
    summary = summarize(rows)
    print(f"{'moved':<8}{'by':>12}{'error, voxels':>16}{'largest':>10}{'Dice':>8}")
    for row in summary:
        amount = f"{row['amount']:g} {'voxels' if row['kind'] == 'shift' else 'deg'}"
        print(f"{row['side']:<8}{amount:>12}{row['error_mean']:>16.2g}{row['error_max']:>10.2g}{row['dice']:>8.3f}")
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "equivariance.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        save_figure(curve_figure({"": rows}, f"{weights}, {len(chosen)} pairs"), folder / "equivariance.png")
    return summary
