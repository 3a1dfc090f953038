"""Where exactness ends: the shipped weights on a background of noise, and on content that the canvas cuts off.

    python bundle/docs/deck/limits.py --weights vessels --dataset_dir DIR
    python bundle/docs/deck/limits.py --weights hippocampus --dataset_dir DIR/Task04_Hippocampus

DIR is as for curves.py. Pairs are of test subjects.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from common import machine, save
from matplotlib.figure import Figure

from equireg import load_network
from equireg.curves import held_out_pairs
from equireg.equivariance import Network
from equireg.networks.active import content_box, shift_grid

DATA = Path(__file__).resolve().parent / "data"
AMPLITUDES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)  # of the noise; content reaches 1
CUTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)  # of the content's length along the first axis
SHIFT, MARGIN = 8, 12  # voxels

Row = dict[str, Any]


def on_canvas(content: torch.Tensor, shift: int) -> torch.Tensor:
    """Put content `(1, 1, *shape)` on a canvas with a margin all around, moved along the first axis."""
    offset = torch.full((1, content.dim() - 2), -MARGIN)
    offset[0, 0] -= shift
    return shift_grid(content, offset, [size + 2 * MARGIN for size in content.shape[2:]], "zeros")


def with_noise(image: torch.Tensor, amplitude: float, noise: torch.Tensor) -> torch.Tensor:
    """Fill the background of an image with noise of up to an amplitude, which stays where it is on the canvas."""
    return torch.where(image == 0, amplitude * noise, image)


def distance(found: torch.Tensor, expected: torch.Tensor, fixed: torch.Tensor) -> tuple[float, float]:
    """Return the mean and the largest distance of two ddfs over the content of the fixed image, voxels."""
    miss = (found - expected).norm(dim=1)[(fixed != 0).any(dim=1)]
    return miss.mean().item(), miss.max().item()


@torch.no_grad()
def noise_rows(network: Network, moving: torch.Tensor, fixed: torch.Tensor, seed: int) -> list[Row]:
    """Move the moving content by `SHIFT` over noise that does not move with it; a mask would write 0 there."""
    there, shape = on_canvas(fixed, 0), on_canvas(moving, 0).shape
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    step = torch.zeros([1, moving.dim() - 2] + [1] * (moving.dim() - 2))
    step[:, 0] = SHIFT
    rows = []
    for amplitude in AMPLITUDES:
        before, after = (network(with_noise(on_canvas(moving, shift), amplitude, noise), there) for shift in (0, SHIFT))
        mean, largest = distance(after, before + step, there)
        rows.append({"kind": "noise", "amount": amplitude, "error_mean": mean, "error_max": largest})
    return rows


@torch.no_grad()
def cut_rows(network: Network, moving: torch.Tensor, fixed: torch.Tensor) -> list[Row]:
    """Cut a part off the moving content; how far does the answer change where it should not have to?"""
    there, whole = on_canvas(fixed, 0), on_canvas(moving, 0)
    answer = network(whole, there)
    first, last = content_box(whole)
    length = int(last[0, 0] - first[0, 0]) + 1
    index = torch.arange(there.shape[2]).reshape([-1] + [1] * (there.dim() - 3))
    rows = []
    for cut in CUTS:
        end = int(first[0, 0]) + length - round(cut * length)
        kept = whole.clone()
        kept[:, :, end:] = 0
        seen = (answer[:, 0] + index < end)[:, None] & (there != 0)  # what the whole image matched with what is left
        mean, largest = distance(network(kept, there), answer, there * seen)
        rows.append({"kind": "cut", "amount": cut, "error_mean": mean, "error_max": largest})
    return rows


def draw(rows: list[Row], title: str) -> Figure:
    """Draw the mean error of every pair and their mean against noise and against cut."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for panel, (kind, label) in zip(
        figure.subplots(1, 2), (("noise", "amplitude of the noise"), ("cut", "part cut off"))
    ):
        chosen = [row for row in rows if row["kind"] == kind]
        amounts = sorted({row["amount"] for row in chosen})
        values = np.array([[r["error_mean"] for r in chosen if r["amount"] == a] for a in amounts])
        panel.plot(amounts, values, color="0.75", lw=0.8)
        panel.plot(amounts, values.mean(axis=1), "o-")
        panel.set(xlabel=label, ylabel="mean error, voxels")
        panel.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def main(
    weights: str = "vessels", dataset_dir: str = "", pairs: int = 8, seed: int = 2_000_003, output_dir: str = ""
) -> None:
    """Measure, print, write `limits_<weights>.csv` and draw `limits_<weights>.png`.

    Args:
        weights: name of shipped weights, or a file.
        dataset_dir: folder of the images.
        pairs: number of pairs.
        seed: of the pairs and of the noise.
        output_dir: where table and figure go; beside the page if empty.
    """
    network = load_network(weights)
    rows: list[Row] = []
    for number, pair in enumerate(held_out_pairs(network.spatial_dims, dataset_dir, pairs, seed)):
        images = []
        for key in ("moving", "fixed"):
            image = torch.as_tensor(pair[key])[None].float()
            first, last = content_box(image)
            images.append(shift_grid(image, first, (last - first + 1)[0].tolist(), "zeros"))
        found = noise_rows(network, *images, seed + number) + cut_rows(network, *images)
        rows += [{"pair": number, **row} for row in found]
    print(f"{machine()}; {weights}, {pairs} pairs, seed {seed}; noise under a content moved by {SHIFT} voxels")
    print("| | amount | mean error (sd over pairs), voxels | largest |\n|---|---|---|---|")
    for kind, amounts in (("noise", AMPLITUDES), ("cut", CUTS)):
        for amount in amounts:
            chosen = [row for row in rows if (row["kind"], row["amount"]) == (kind, amount)]
            means = np.array([row["error_mean"] for row in chosen])
            largest = max(row["error_max"] for row in chosen)
            print(f"| {kind} | {amount:g} | {means.mean():.2g} ({means.std(ddof=1):.2g}) | {largest:.2g} |")
    stem, folder = Path(weights).stem, Path(output_dir) if output_dir else DATA
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"limits_{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if k.startswith("error") else v for k, v in row.items()} for row in rows)
    save(draw(rows, f"{stem}, {pairs} pairs"), f"limits_{stem}.png", output_dir)


if __name__ == "__main__":
    fire.Fire(main)
