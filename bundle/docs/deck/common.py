"""What the scripts of the deck's page share: pairs of images, figures, and where numbers come from."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import pad

from equireg.pictures import save_figure
from equireg.synthesis import synthetic_pair

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def vessels(count: int, seed: int = 0, shape: tuple[int, int] = (96, 96), deformation: float = 0.04) -> torch.Tensor:
    """Return pairs of synthetic vessel trees that are warped but not shifted, `(count, 2, *shape)`."""
    generator = np.random.default_rng(seed)
    pairs = [synthetic_pair(shape, generator, 0, "vessels", deformation) for _ in range(count)]
    return torch.stack([torch.cat([pair["moving"], pair["fixed"]]) for pair in pairs])


def with_margin(image: torch.Tensor, margin: int) -> torch.Tensor:
    """Surround a 2D image by background."""
    return pad(image, [margin] * 4)


def save(figure: Figure, name: str, output_dir: str) -> None:
    """Write a figure beside the page, or into another folder."""
    folder = Path(output_dir) if output_dir else FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    path = save_figure(figure, folder / name)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size, for a repository
    print(f"figure: {path.name}")


def machine() -> str:
    """Say what the numbers were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
