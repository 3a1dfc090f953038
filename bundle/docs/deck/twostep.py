"""Section 4 of the deck's page: composition keeps [W,U] equivariance, and loses it when its first step lacks it.

    python bundle/docs/deck/twostep.py

Steps are those of the shipped `vessels` weights: its attention stage Xi and its last U-Net Psi.
"""

from __future__ import annotations

import fire
import numpy as np
import torch
from common import machine, save, vessels, with_margin
from matplotlib.figure import Figure
from torch import nn

from equireg import load_network
from equireg.equivariance import error_map
from equireg.fields import warp
from equireg.moves import AffineMove, translation
from equireg.networks import TwoStep

STRIDE = 32  # of a U-Net of five levels: joint shifts by multiples of it are exact
MARGIN = 96  # with 64, the border of the canvas reaches moved content through the U-Net: 0.1 voxel


def error(
    net: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, moves: tuple[AffineMove, AffineMove]
) -> np.ndarray:
    """Return the largest error over the fixed content of each pair."""
    errors = error_map(net, moving, fixed, *moves)
    content = moves[1].image(fixed)[:, 0] != 0
    return np.array([sample[inside].nan_to_num(0.0).max().item() for sample, inside in zip(errors, content)])


def main(pairs: int = 8, seed: int = 0, output_dir: str = "") -> dict[str, float]:
    """Measure single steps and compositions under moving-only, joint and independent shifts, and draw warped images.

    Args:
        pairs: number of pairs.
        seed: of the pairs.
        output_dir: where the figure goes; beside the page if empty.

    Returns:
        Largest [W,U] error over the pairs for each network, voxels.
    """
    network = load_network("vessels")
    xi, psi = network.attention_stage(), network.steps.second  # type: ignore[union-attr]
    moving, fixed = (with_margin(image, MARGIN) for image in vessels(pairs, seed).split(1, dim=1))

    def moves(of_moving: tuple[int, int], of_fixed: tuple[int, int]) -> tuple[AffineMove, AffineMove]:
        return translation(of_moving, moving.shape[2:]), translation(of_fixed, fixed.shape[2:])

    cases = {
        "moving alone, (37, -21)": moves((37, -21), (0, 0)),
        f"both, ({STRIDE}, {-STRIDE})": moves((STRIDE, -STRIDE), (STRIDE, -STRIDE)),
        f"(37, -21) and ({-STRIDE}, {STRIDE})": moves((37, -21), (-STRIDE, STRIDE)),
    }
    networks: dict[str, nn.Module] = {
        "Xi": xi,
        "Psi": psi,
        "TwoStep{Xi, Psi}": TwoStep(xi, psi),
        "TwoStep{TwoStep{Xi, Psi}, Psi}": TwoStep(TwoStep(xi, psi), psi),
        "broken: TwoStep{Psi, Xi}": TwoStep(psi, xi),
        "broken: TwoStep{Psi, Psi}": TwoStep(psi, psi),
    }
    print(f"{machine()}; {pairs} pairs, seed {seed}; largest error over content and pairs (median over pairs), voxels")
    print("| | " + " | ".join(cases) + " |\n|" + "---|" * (len(cases) + 1))
    result: dict[str, float] = {}
    for name, net in networks.items():
        values = [error(net.eval(), moving, fixed, case) for case in cases.values()]
        result[name] = values[-1].max()
        print(f"| {name} | " + " | ".join(f"{v.max():.2g} ({np.median(v):.2g})" for v in values) + " |")
    case = cases["moving alone, (37, -21)"]
    figure = Figure(figsize=(9.6, 4.9), layout="constrained")
    panels = figure.subplots(2, 4)
    chosen = ("Xi", "TwoStep{Xi, Psi}", "broken: TwoStep{Psi, Xi}", "broken: TwoStep{Psi, Psi}")
    for row, image in enumerate((moving[:1], case[0].image(moving[:1]))):
        for panel, name in zip(panels[row], chosen):
            with torch.inference_mode():
                moved = warp(image, networks[name](image, fixed[:1]), padding="zeros")
            overlay = torch.stack([moved[0, 0], fixed[0, 0], moved[0, 0]], dim=-1)  # magenta and green
            panel.imshow(overlay[MARGIN:-MARGIN, MARGIN:-MARGIN].clamp(0, 1).numpy())
            panel.set(xticks=[], yticks=[])
            panel.set_title(name, fontsize=9)
    panels[0, 0].set_ylabel("unshifted", fontsize=9)
    panels[1, 0].set_ylabel("moving shifted by (37, -21)", fontsize=9)
    save(figure, "deck_twostep.png", output_dir)
    return result


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
