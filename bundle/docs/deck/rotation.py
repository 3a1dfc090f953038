"""Section 7 of the deck's page: Dice against the angle of one image, for networks with and without turns in training.

    python bundle/docs/deck/rotation.py --dataset_dir DIR

with the folder of `retina.py` trains every network that the results file does not have yet, scores it with the moving
eye turned by each angle, adds a row per angle to the file, prints the table and draws it. The networks with turns have
features averaged over the turns of the grid and see both images of a training pair turned at random, which is undone
around the network before the loss: so regularity is judged between upright images. For attention angles grow: first
they are multiples of 90 degrees, in the end anything from 0 to 360. A hybrid starts from the attention of its kind,
with all angles at once, and is trained as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np
import retina
import torch
from common import machine, save
from matplotlib.figure import Figure
from monai.transforms import Compose
from monai.utils import set_determinism
from torch import nn

from equireg.augmentation import RandWarpPaird
from equireg.data import WarpedPairDataset
from equireg.fields import identity_grid, warp
from equireg.moves import AffineMove, read_at, rotation, turn_angle
from equireg.networks import CoordinateAttention, DisplacementUNet, Downsample, PairNetwork, TwoStep
from equireg.networks.combinators import both
from equireg.transforms import NormalizeContentd, StackPaird

HERE = Path(__file__).resolve().parent
NETWORKS = ("attention only", "attention only, turns", "hybrid", "hybrid, turns")
OLD, NEW = [retina.INNER] * 2, [64] * 2  # upright canvas, and one on which an eye loses nothing at any angle, pixels
RADIUS = 31.0  # of the disc that stays on the canvas, pixels; content reaches 31.6 pixels from the center, once
RAMP = (0.15, 0.65)  # of the training, where angles grow
FLAT = 0.03  # Dice, largest minus smallest over the angles
FIELDS = ("network", "features", "seed", "angle", "pairs", "dice", "dice_sd", "dice_turned", "steps", "seconds")


def pairs(images: list[dict[str, torch.Tensor]], seed: int, length: int) -> WarpedPairDataset:
    """Make upright pairs: those of `retina.pairs`, "baseline", on a square canvas."""
    transform = Compose([NormalizeContentd(("moving", "fixed")), StackPaird()])
    return WarpedPairDataset(images, RandWarpPaird(), transform=transform, length=length, seed=seed)


def build(name: str, features: int) -> nn.Module:
    """Build a network called `net(moving, fixed)`; with "turns", its attention follows quarter turns exactly."""
    turns, hybrid = name.endswith("turns"), name.startswith("hybrid")
    attention = CoordinateAttention(2, feature_channels=features, padding=1, rotation_group="grid" if turns else "none")
    net: nn.Module = Downsample(attention, 4, content_phase=True, centered=turns)
    for _ in range(2 if hybrid else 0):
        net = TwoStep(net, DisplacementUNet(2, channels=retina.UNET_CHANNELS))
    return net


def turn_by(degrees: float) -> AffineMove:
    """Return the turn of an upright image about its center, onto the larger canvas."""
    return rotation(turn_angle(degrees, 2), OLD, NEW)


def turned(images: torch.Tensor, moves: Sequence[AffineMove]) -> torch.Tensor:
    """Turn each image of a batch by its own move, `(B, 1, *OLD)` to `(B, 1, *NEW)`."""
    return torch.cat([move.image(image[None]) for move, image in zip(moves, images)])


def upright(answer: torch.Tensor, moving: Sequence[AffineMove], fixed: Sequence[AffineMove]) -> torch.Tensor:
    """Return the ddfs between turned images, `(B, 2, *NEW)`, as ddfs between the upright ones, `(B, 2, *OLD)`.

    Outside the disc that never leaves the canvas, the displacement of the nearest point inside continues.
    """
    grid = identity_grid(OLD, answer.dtype)
    center = 0.5 * (retina.INNER - 1)
    distance = torch.linalg.vector_norm(grid - center, dim=1, keepdim=True)
    inside = center + (grid - center) * (RADIUS / distance).clamp(max=1.0)
    points = torch.cat([move.to_new(inside) for move in fixed])
    points = points + read_at(answer, points)
    return torch.cat([move.to_old(p[None]) for move, p in zip(moving, points)]) - inside


class Turning(nn.Module):
    """Turn both images of a pair by random angles, register them, and answer for the upright images.

    It is the `PairNetwork` of training mode around a network that sees the turned images only.

    Args:
        net: called `net(moving, fixed)`.
        seed: of the angles.
        growing: whether angles start as multiples of 90 degrees; if not, they are uniform from the first step on.
    """

    def __init__(self, net: nn.Module, seed: int, growing: bool) -> None:
        super().__init__()
        self.net = net
        self.growing = growing
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    @property
    def reach(self) -> float:
        """How far angles lie from a multiple of 90 degrees, of the 45 there are: all, and so uniform, in the end."""
        if not self.growing:
            return 1.0
        progress = self.steps / (retina.EPOCHS * retina.STEPS)
        return min(1.0, max(0.0, (progress - RAMP[0]) / (RAMP[1] - RAMP[0])))

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """Return `(B, 6, *OLD)` for a stacked pair: ddf and moved image, in both directions."""
        moving, fixed = pair.as_subclass(torch.Tensor).split(1, dim=1)
        quarters = torch.randint(4, (2, len(pair)), generator=self.generator)
        angles = 90 * (quarters + self.reach * (torch.rand(2, len(pair), generator=self.generator) - 0.5))
        self.steps += 1
        a, b = ([turn_by(angle) for angle in row] for row in angles.tolist())
        ddf, ddf_back = both(self.net, turned(moving, a), turned(fixed, b))
        ddf, ddf_back = upright(ddf, a, b), upright(ddf_back, b, a)
        return torch.cat([ddf, warp(moving, ddf, padding="zeros"), ddf_back, warp(fixed, ddf_back, padding="zeros")], 1)


def train(
    name: str, features: int, images: list[dict[str, torch.Tensor]], seed: int, weights_dir: str = ""
) -> nn.Module:
    """Train a network as in `retina.py`, but for the turns and what it starts from.

    A hybrid goes on from the attention of its kind: one of the folder, or else one that is trained here.
    """
    turns, start = name.endswith("turns"), name.replace("hybrid", "attention only")
    set_determinism(seed)
    net = build(name, features)
    if start != name:
        file = weights_file(start, features, seed, weights_dir)
        known = file is not None and file.exists()
        weights = torch.load(file) if known else train(start, features, images, seed, weights_dir).state_dict()
        net.first.first.load_state_dict(weights)
        set_determinism(seed)
    network = Turning(net, seed, growing=name != "hybrid, turns") if turns else PairNetwork(net)
    retina.fit(network, pairs(images, seed, 1_000_000), seed)
    return net.eval()


def weights_file(name: str, features: int, seed: int, weights_dir: str) -> Path | None:
    """Say where the weights of a network are kept, if they are."""
    file = f"{name}_{features}_{seed}.pt".replace(", ", "-").replace(" ", "-")
    return Path(weights_dir) / file if weights_dir else None


def overlaps(moved: torch.Tensor, fixed: torch.Tensor) -> np.ndarray:
    """Return the Dice of each pair of a batch, `(B,)`."""
    a, b = (image.flatten(1) > retina.THRESHOLD for image in (moved, fixed))
    return (2 * (a & b).sum(1) / (a.sum(1) + b.sum(1))).numpy()


@torch.inference_mode()
def evaluate(net: nn.Module, images: list[dict[str, torch.Tensor]], angle: float, warps: int) -> dict[str, Any]:
    """Score a network on `warps` fixed warps of every eye, the moving one turned.

    "dice" is that of the upright moving image under the answer brought back to it, which interpolates once at any
    angle; "dice_turned" that of the turned image under the answer, interpolated twice unless by quarter turns.
    """
    data = pairs(images, 2_000_003, warps * len(images))
    moving, fixed = torch.stack([data[k]["image"].as_subclass(torch.Tensor) for k in range(len(data))]).split(1, dim=1)
    there, still = [turn_by(angle)] * len(data), [turn_by(0)] * len(data)
    seen, target = turned(moving, there), turned(fixed, still)
    answer = net(seen, target)
    dice = overlaps(warp(moving, upright(answer, there, still), padding="zeros"), fixed)
    own = overlaps(warp(seen, answer, padding="zeros"), target)
    return {
        "angle": angle,
        "pairs": len(data),
        "dice": f"{dice.mean():.5f}",
        "dice_sd": f"{dice.std(ddof=1) if len(dice) > 1 else 0:.5f}",
        "dice_turned": f"{own.mean():.5f}",
    }


def main(
    dataset_dir: str,
    seeds: int = 1,
    first_seed: int = 0,
    networks: tuple[str, ...] = NETWORKS,
    angles: tuple[float, ...] = tuple(range(0, 360, 15)),
    features: int = 128,
    warps: int = 4,
    results: str = str(HERE / "data" / "rotation.csv"),
    weights_dir: str = "output/deck_rotation",
    output_dir: str = "",
) -> None:
    """Train what is missing, score it at every angle, print the table and draw it.

    Args:
        dataset_dir: folder of the vessel masks, see `retina.py`.
        seeds: networks of each kind.
        first_seed: the least of their seeds.
        networks: which, of "attention only" and "hybrid", with ", turns" behind for turns in training.
        angles: of the moving image, degrees.
        features: width of the attention's features.
        warps: random warps of every test eye.
        results: CSV file, read and added to.
        weights_dir: where trained weights go; an empty text keeps none.
        output_dir: where the figure goes; beside the page if empty.
    """
    path = Path(results)
    training, test = retina.eyes(dataset_dir, "training"), retina.eyes(dataset_dir, "test")
    training += [{"image": item["image"].flip(1)} for item in training]
    for seed in range(first_seed, first_seed + seeds):
        for name in networks:
            done = {(row["network"], row["features"], row["seed"]) for row in retina.read(path)}
            if (name, str(features), str(seed)) in done:
                continue
            start = time.process_time()
            net = train(name, features, training, seed, weights_dir)
            row = {
                "network": name,
                "features": features,
                "seed": seed,
                "steps": retina.EPOCHS * retina.STEPS,
                "seconds": round(time.process_time() - start),
            }
            rows = [{**row, **evaluate(net, test, angle, warps)} for angle in angles]
            retina.append(path, rows, FIELDS)
            if (file := weights_file(name, features, seed, weights_dir)) is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(net.state_dict(), file)
    print(machine())
    rows = [row for row in retina.read(path) if row["features"] == str(features)]
    table(rows)
    draw(rows, output_dir)


def curves(rows: list[dict[str, str]], column: str = "dice") -> dict[tuple[str, str], dict[float, float]]:
    """Return Dice by angle, for each network and seed."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        found.setdefault((row["network"], row["seed"]), {})[float(row["angle"])] = float(row[column])
    return found


def table(rows: list[dict[str, str]]) -> None:
    """Print Dice by angle, and whether it is flat."""
    by_network = curves(rows)
    print("| angle | " + " | ".join(f"{name}, seed {seed}" for name, seed in by_network) + " |")
    print("|---" * (1 + len(by_network)) + "|")
    for angle in sorted({angle for curve in by_network.values() for angle in curve}):
        print(f"| {angle:g} | " + " | ".join(f"{curve.get(angle, np.nan):.3f}" for curve in by_network.values()) + " |")
    for column in ("dice", "dice_turned"):
        for (name, seed), curve in curves(rows, column).items():
            low, high = min(curve.values()), max(curve.values())
            verdict = "pass" if high - low <= FLAT else "FAIL"
            print(f"{verdict}: {column}, {name}, seed {seed}: {low:.3f} to {high:.3f}, spread {high - low:.3f}")


def draw(rows: list[dict[str, str]], output_dir: str) -> None:
    """Draw Dice against the angle."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(row["network"] for row in rows))
    for (name, seed), curve in curves(rows).items():
        angles = sorted(curve)
        label = name if seed == "0" else None
        panel.plot(angles, [curve[a] for a in angles], "o-", ms=3, color=f"C{names.index(name)}", label=label)
    panel.set(xlabel="angle of the moving image, degrees", ylabel="Dice", ylim=(0, 0.9), xticks=range(0, 361, 45))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, "deck_rotation.png", output_dir)


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
