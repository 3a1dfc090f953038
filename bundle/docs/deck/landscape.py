"""Section 5 of the deck's page: the loss of a one-parameter first step, alone and with a network behind it.

    python bundle/docs/deck/landscape.py

T shifts by (t, 0); on pairs that are warped but not shifted its best t is 0. The network behind it, Phi, is the two
U-Nets of the shipped `vessels` weights, without its attention.
"""

from __future__ import annotations

import fire
import numpy as np
import torch
from common import machine, save, vessels, with_margin
from matplotlib.figure import Figure
from torch import nn

from equireg import load_network
from equireg.fields import warp
from equireg.losses import LocalCorrelationLoss
from equireg.networks import TwoStep


class Shift(nn.Module):
    """T: the same displacement everywhere, `t` widths of the image along the first axis (deck, equation 12)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))
        self.width = width

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the constant ddf."""
        direction = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(fixed.shape[0], 2, *fixed.shape[2:])
        return direction * (self.t * self.width)


def half_width(t: np.ndarray, loss: np.ndarray) -> float:
    """Return how far from its least loss, on average to both sides, a curve first reaches half its depth."""
    lowest = int(loss.argmin())
    half = 0.5 * (loss.min() + 0.5 * (loss[:3].mean() + loss[-3:].mean()))
    sides = []
    for step in (-1, 1):
        k = lowest
        while 0 < k < len(t) - 1 and loss[k] < half:
            k += step
        sides.append(abs(t[k] - t[lowest]))
    return float(np.mean(sides))


def reach_of(t: np.ndarray, slope: np.ndarray) -> float:
    """Return up to which distance from 0 a slope points back to it everywhere, on average of both sides."""
    sides = []
    for sign in (-1, 1):
        outward, wrong = sign * t > 1e-6, sign * slope <= 0
        distances = np.abs(t[outward & wrong])
        sides.append(distances.min() if len(distances) else np.abs(t).max())
    return float(np.mean(sides))


def main(
    points: int = 81, batches: int = 8, batch_size: int = 4, reach: float = 0.5, seed: int = 0, output_dir: str = ""
) -> dict[str, float]:
    """Compute both losses and their gradients against t by back-propagation, and draw them.

    Args:
        points: values of t, from -reach to reach.
        batches: batches of pairs, for the spread.
        batch_size: pairs in a batch.
        reach: largest t, in widths of the image.
        seed: of the pairs.
        output_dir: where the figure goes; beside the page if empty.

    Returns:
        Best t and half width of the basin of either curve.
    """
    refinements = load_network("vessels").steps
    phi = TwoStep(refinements.first.second, refinements.second).requires_grad_(False).eval()  # type: ignore[union-attr]
    size, margin = 96, 8
    shift = Shift(size)
    networks = {"T": shift, "TwoStep{T, Phi}": TwoStep(shift, phi)}
    losses = {"mean squared difference": nn.MSELoss(), "1 - local correlation": LocalCorrelationLoss(sigma=4.0)}
    t = np.linspace(-reach, reach, points)
    shape = (len(losses), len(networks), batches, points)
    loss, slope = np.zeros(shape), np.zeros(shape)
    for b in range(batches):
        moving, fixed = (with_margin(x, margin) for x in vessels(batch_size, seed + b, (size, size)).split(1, dim=1))
        for k, value in enumerate(t):
            shift.t.data.fill_(float(value))
            for n, network in enumerate(networks.values()):
                moved = warp(moving, network(moving, fixed), padding="zeros")
                for m, measure in enumerate(losses.values()):
                    result = measure(moved, fixed)
                    (gradient,) = torch.autograd.grad(result, shift.t, retain_graph=m < len(losses) - 1)
                    loss[m, n, b, k], slope[m, n, b, k] = result.item(), gradient.item()
    print(
        f"{machine()}; {batches} batches of {batch_size} pairs, seeds {seed} to {seed + batches - 1}; t in image widths"
    )
    print(
        "sd over batches; share of slopes that point to 0: batches and 0.02 < abs(t) <= 0.2; up to: of the mean slope"
    )
    print("| loss | network | best t | least loss | plateau | half width (sd) | slope points to 0 | up to |")
    print("|---|---|---|---|---|---|---|---|")
    result_table: dict[str, float] = {}
    near = (np.abs(t) > 0.02) & (np.abs(t) <= 0.2)
    for m, measure_name in enumerate(losses):
        for n, name in enumerate(networks):
            mean = loss[m, n].mean(axis=0)
            widths = [half_width(t, curve) for curve in loss[m, n]]
            right = (np.sign(slope[m, n]) == np.sign(t))[:, near].mean()
            best = t[mean.argmin()]
            reach_back = reach_of(t, slope[m, n].mean(axis=0))
            plateau = 0.5 * (mean[:3].mean() + mean[-3:].mean())
            print(
                f"| {measure_name} | {name} | {best:.3f} | {mean.min():.4f} | {plateau:.4f} | "
                f"{np.mean(widths):.3f} ({np.std(widths, ddof=1):.3f}) | {100 * right:.0f} % | {reach_back:.3f} |"
            )
            result_table[f"{measure_name}, {name}, best t"] = float(best)
            result_table[f"{measure_name}, {name}, half width"] = float(np.mean(widths))
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for m, measure_name in enumerate(losses):
        for n, (name, color) in enumerate(zip(networks, ("tab:gray", "tab:red"))):
            for row, values in enumerate((loss, slope)):
                mean, sd = values[m, n].mean(axis=0), values[m, n].std(axis=0)
                panels[row, m].plot(t, mean, color=color, label=name)
                panels[row, m].fill_between(t, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
        panels[0, m].set_title(measure_name, fontsize=10)
        panels[1, m].set(xlabel="t, image widths")
        panels[1, m].axhline(0, color="k", lw=0.5)
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("gradient to t")
    panels[0, 0].legend(fontsize=8)
    save(figure, "deck_landscape.png", output_dir)
    return result_table


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
