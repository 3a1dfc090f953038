"""Section 1 of the deck's page: what equivariance asks, and why nothing can obey it for all images.

python bundle/docs/deck/definition.py
"""

from __future__ import annotations

import fire
import torch
from common import machine, save, vessels, with_margin
from matplotlib.figure import Figure

from equireg import load_network
from equireg.equivariance import error_map
from equireg.fields import warp
from equireg.moves import translation


def main(shift: int = 24, seed: int = 0, output_dir: str = "") -> dict[str, float]:
    """Measure the law on two vessel trees and on two images of zeros, and draw the first.

    Args:
        shift: how far the moving content moves, voxels.
        seed: of the vessel trees.
        output_dir: where the figure goes; beside the page if empty.

    Returns:
        Largest error in voxels on each pair.
    """
    network = load_network("vessels")
    moving, fixed = (with_margin(image, shift) for image in vessels(1, seed).split(1, dim=1))
    zeros = torch.zeros_like(moving)
    move = translation((shift, -shift // 2), moving.shape[2:])
    moved = move.image(moving)
    errors = {
        "vessels": error_map(network, moving, fixed, move).max().item(),
        "two images of zeros": error_map(network, zeros, zeros, move).max().item(),
    }
    with torch.inference_mode():
        before, after = network(moving, fixed), network(moved, fixed)
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    panels = figure.subplots(2, 4)
    for row, (image, ddf, name) in enumerate([(moving, before, "moving"), (moved, after, "moving, moved")]):
        shown = [(image, name), (fixed, "fixed"), (warp(image, ddf, padding="zeros"), "warped")]
        for panel, (picture, title) in zip(panels[row], shown):
            panel.imshow(picture[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set_title(title, fontsize=9)
        field = panels[row, 3].imshow(ddf[0, 0].numpy(), cmap="coolwarm", vmin=-shift - 8, vmax=shift + 8)
        panels[row, 3].set_title("displacement along axis 0, voxels", fontsize=9)
        figure.colorbar(field, ax=panels[row, 3], shrink=0.8)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    save(figure, "deck_definition.png", output_dir)
    print(f"{machine()}; moving content moved by ({shift}, {-shift // 2})")
    for name, error in errors.items():
        print(
            f"largest error on {name}: {error:.2g} voxels (the move is {(move.offset.norm().item()):.2f} voxels long)"
        )
    return errors


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
