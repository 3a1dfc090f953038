"""Error and Dice of the shipped weights while one image is shifted or turned, where exactness holds and where it ends.

    python bundle/docs/deck/curves.py --weights vessels --dataset_dir DIR
    python bundle/docs/deck/curves.py --weights hippocampus --dataset_dir DIR/Task04_Hippocampus --pairs 4

DIR holds `retina_chase28/observer1/*.png` and `retina_hrf/*.png`; without it, images are synthetic. Pairs are of test
subjects.
"""

from __future__ import annotations

import csv
from pathlib import Path

import fire
from common import machine, save

from equireg import load_network
from equireg.curves import ANGLES, SHIFTS, Row, curve_figure, equivariance_curve, held_out_pairs, summarize
from equireg.equivariance import Cropped

DATA = Path(__file__).resolve().parent / "data"


def main(
    weights: str = "vessels",
    dataset_dir: str = "",
    pairs: int = 8,
    seed: int = 2_000_003,
    shifts: tuple[float, ...] = SHIFTS,
    angles: tuple[float, ...] = ANGLES,
    output_dir: str = "",
) -> dict[str, list[Row]]:
    """Measure, print, write `equivariance_<weights>.csv` and draw `equivariance_<weights>.png`.

    Args:
        weights: name of shipped weights, or a file.
        dataset_dir: folder of the images.
        pairs: number of pairs.
        seed: of the pairs.
        shifts: voxels.
        angles: degrees.
        output_dir: where table and figure go; beside the page if empty.

    Returns:
        Rows of each curve.
    """
    network = load_network(weights)
    images = held_out_pairs(network.spatial_dims, dataset_dir, pairs, seed)
    curves: dict[str, list[Row]] = {"network": [], "through the inferer": []}
    for side in ("moving", "fixed"):
        curves["network"] += equivariance_curve(network, images, shifts, "shift", side)
    curves["through the inferer"] += equivariance_curve(Cropped(network), images, shifts, "shift", "fixed")
    curves["network"] += equivariance_curve(network, images, angles, "angle", "moving")
    print(f"{machine()}; {weights}, {pairs} pairs, seed {seed}")
    print("| | moved | by | mean error, voxels | largest | Dice, mean (sd over pairs) |\n|---|---|---|---|---|---|")
    for name, rows in curves.items():
        for r in summarize(rows):
            amount = f"{r['amount']:g} {'voxels' if r['kind'] == 'shift' else 'degrees'}"
            dice = f"{r['dice']:.3f} ({r['dice_sd']:.3f})"
            print(f"| {name} | {r['side']} | {amount} | {r['error_mean']:.2g} | {r['error_max']:.2g} | {dice} |")
    folder = Path(output_dir) if output_dir else DATA
    folder.mkdir(parents=True, exist_ok=True)
    flat = [
        {"called": name, **row, **{key: f"{row[key]:.4g}" for key in ("error_mean", "error_max", "dice")}}
        for name, rows in curves.items()
        for row in rows
    ]
    stem = Path(weights).stem
    with open(folder / f"equivariance_{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    save(curve_figure(curves, f"{stem}, {pairs} pairs"), f"equivariance_{stem}.png", output_dir)
    return curves


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
