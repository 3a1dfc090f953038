"""Section 3 of the deck's page: a network that just predicts displacements follows joint shifts and no others.

    python bundle/docs/deck/displacement.py

The network is the last U-Net of the shipped `vessels` weights, on vessel trees that are warped but not shifted.
"""

from __future__ import annotations

import fire
import numpy as np
from common import machine, save, vessels, with_margin
from matplotlib.figure import Figure

from equireg import load_network
from equireg.equivariance import error_map
from equireg.moves import translation

SHIFTS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64)


def main(
    shifts: tuple[int, ...] = SHIFTS, pairs: int = 8, seed: int = 0, output_dir: str = ""
) -> dict[str, list[float]]:
    """Measure mean errors over the fixed content against the shift of both images, of one, and of each its own way.

    Args:
        shifts: voxels along the first axis.
        pairs: number of pairs.
        seed: of the pairs.
        output_dir: where the figure goes; beside the page if empty.

    Returns:
        Mean error at each shift, for each way of moving.
    """
    unet = load_network("vessels").steps.second  # type: ignore[union-attr]  # modules have any attribute
    room = max(shifts)
    moving, fixed = (with_margin(image, room) for image in vessels(pairs, seed).split(1, dim=1))
    canvas = moving.shape[2:]
    ways = {"both alike, [U,U]": (1, 1), "moving alone": (1, 0), "fixed alone": (0, 1), "apart, [W,U]": (0.5, -0.5)}
    means: dict[str, list[float]] = {}
    spread: dict[str, list[float]] = {}
    for name, factors in ways.items():
        for shift in shifts:
            moves = [translation((int(factor * shift), 0), canvas) for factor in factors]
            errors = error_map(unet, moving, fixed, *moves)
            content = moves[1].image(fixed)[:, 0] != 0
            values = np.array([sample[inside].nanmean().item() for sample, inside in zip(errors, content)])
            means.setdefault(name, []).append(values.mean())
            spread.setdefault(name, []).append(values.std(ddof=1) if pairs > 1 else 0.0)
    print(f"{machine()}; {pairs} pairs, seed {seed}; mean (sd over pairs) of the mean error over content, voxels")
    print("| shift, voxels | " + " | ".join(ways) + " |\n|" + "---|" * (len(ways) + 1))
    for k, shift in enumerate(shifts):
        print(f"| {shift} | " + " | ".join(f"{means[n][k]:.2g} ({spread[n][k]:.1g})" for n in ways) + " |")
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    panel = figure.subplots()
    for name, values in means.items():
        panel.plot(shifts, np.maximum(values, 1e-7), marker=".", label=name)
    panel.set(xlabel="shift, voxels", ylabel="equivariance error, voxels", yscale="log", ylim=(5e-8, None))
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    save(figure, "deck_displacement.png", output_dir)
    return means


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
