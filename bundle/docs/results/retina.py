"""Register synthetically warped retinal vessel masks, unshifted and shifted: the deck's retina experiment.

Test eyes are warped as the paper's are; then, on a canvas large enough to lose nothing, the content of one image is
moved by whole pixels. Each pair is the same pair in every row of the table, only moved. For example

    python bundle/docs/results/retina.py --dataset_dir DIR

with a folder that holds `retina_chase28/observer1/*.png` and `retina_hrf/*.png` (vessel masks of CHASE_DB1 and HRF)
prints a table and writes `retina.csv` (a row per pair, shift and method), `retina.json` and a picture.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import nn
from torch.nn.functional import pad
from tqdm import tqdm

from equireg.fields import warp
from equireg.metrics import folding_fraction
from equireg.pictures import registration_figure, save_figure

BUNDLE = Path(__file__).resolve().parents[2]
THRESHOLD = 0.2  # of the moved and the fixed mask, as in the paper
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def parse(dataset_dir: str, *overlays: str, **overrides: Any) -> ConfigParser:
    """Read the bundle's training config with overlays."""
    sys.path.insert(0, str(BUNDLE))
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "vessels.json", *overlays)])
    parser.update({"dataset_dir": dataset_dir, "bundle_root": str(BUNDLE), **overrides})
    return parser


def load(parser: ConfigParser, weights: str | Path) -> nn.Module:
    """Build a config's network and load weights into it."""
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.net.eval()


def place(image: torch.Tensor, margin: int, shift: tuple[int, int]) -> torch.Tensor:
    """Put an image `(1, 1, *shape)` on a canvas with a margin all around, moved by whole pixels."""
    a, b = shift
    return pad(image, [margin + b, margin - b, margin + a, margin - a])


def dice(moved: torch.Tensor, fixed: torch.Tensor) -> float:
    """Overlap of two masks."""
    a, b = moved > THRESHOLD, fixed > THRESHOLD
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def main(
    dataset_dir: str,
    weights: str = str(BUNDLE / "models" / "vessels.pt"),
    unet_weights: str = "",
    warps: int = 8,
    shift: int = 32,
    split: str = "test",
    seed: int = 2000003,
    output_dir: str = "retina_results",
) -> None:
    """Measure Dice on shifted and unshifted pairs and print the table.

    Args:
        dataset_dir: folder of the vessel masks.
        weights: weights of the network of vessels.json.
        unet_weights: weights of the network of unet.json, whose first step is a U-Net; left out if empty.
        warps: random warps of every eye.
        shift: how far contents are moved, pixels.
        split: "test" or "validation".
        seed: seed of the warps.
        output_dir: where files are written.
    """
    choice = {"validate#dataset#data#split": split, "validate#dataset#seed": seed}
    eyes = len(parse(dataset_dir, **choice).get_parsed_content("validate#dataset#data"))
    count = warps * eyes
    parser = parse(dataset_dir, **choice, val_pairs=count)
    dataset = parser.get_parsed_content("validate#dataset")
    networks: dict[str, Network | None] = {"unregistered": None, "equireg": load(parser, weights)}
    if unet_weights:
        networks["U-Net in place of attention"] = load(parse(dataset_dir, "unet.json"), unet_weights)
    cases = {
        "unshifted": ((0, 0), (0, 0)),
        f"moving shifted by ({shift}, 0)": ((shift, 0), (0, 0)),
        f"moving shifted by ({shift}, {-shift + 1})": ((shift, -shift + 1), (0, 0)),
        f"fixed shifted by ({shift}, 0)": ((0, 0), (shift, 0)),
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc="pairs", disable=None):
        pair = dataset[index]["image"].as_tensor().unsqueeze(0)
        for case, (moving_shift, fixed_shift) in cases.items():
            moving, fixed = place(pair[:, :1], shift, moving_shift), place(pair[:, 1:], shift, fixed_shift)
            for name, network in networks.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    ddf = torch.zeros(1, 2, *fixed.shape[2:]) if network is None else network(moving, fixed)
                seconds = time.perf_counter() - start
                moved = warp(moving, ddf, padding="zeros")
                score, folding = dice(moved, fixed), folding_fraction(ddf).item()
                rows.append(
                    {"pair": index, "case": case, "method": name, "dice": score, "folding": folding, "seconds": seconds}
                )
                if index == 0 and name == "equireg" and moving_shift == (shift, 0):
                    save_figure(registration_figure(moving[0], fixed[0], moved[0], ddf[0]), folder / "retina.png")
    with open(folder / "retina.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary: dict[str, Any] = {
        "eyes": eyes,
        "pairs": count,
        "split": split,
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "results": {},
    }
    print(f"| Dice, mean (sd) over {count} pairs of {eyes} {split} eyes | " + " | ".join(networks) + " |")
    print("|---" * (len(networks) + 1) + "|")
    for case in cases:
        cells = []
        for name in networks:
            chosen = [row for row in rows if row["case"] == case and row["method"] == name]
            values = np.array([row["dice"] for row in chosen])
            summary["results"][f"{case}, {name}"] = {
                "dice_mean": values.mean(),
                "dice_sd": values.std(ddof=1),
                "folding_mean": float(np.mean([row["folding"] for row in chosen])),
                "seconds_median": float(np.median([row["seconds"] for row in chosen])),
            }
            cells.append(f"{values.mean():.3f} ({values.std(ddof=1):.3f})")
        print(f"| {case} | " + " | ".join(cells) + " |")
    (folder / "retina.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
