"""Section 2 of the deck's page: attention inverts a function, and follows any warp of its images.

    python bundle/docs/deck/diffeomorphism.py

On [0, 1] the moving image is `A(x) = cos(pi x / 2)` and the fixed one `B(x) = x + 0.07 sin(3 pi x)`: one channel in
one dimension, both diffeomorphisms, so that `A^-1 o B = 2 / pi arccos(x + 0.07 sin(3 pi x))` is the one exact answer.
Nothing is trained: features are 100 random sines of an image's value, as in the authors' example, and the attention is
the one that `CoordinateAttention` uses.
"""

from __future__ import annotations

import fire
import numpy as np
import torch
from common import machine, save
from matplotlib.figure import Figure

from equireg.networks.attention import attend

WIDTH = 59.0  # standard deviation of the frequencies, the authors' for 100 samples
FEATURES = 100


def moving_image(x: torch.Tensor) -> torch.Tensor:
    """Return A(x)."""
    return torch.cos(0.5 * torch.pi * x)


def fixed_image(x: torch.Tensor) -> torch.Tensor:
    """Return B(x)."""
    return x + 0.07 * torch.sin(3 * torch.pi * x)


def answer(x: torch.Tensor) -> torch.Tensor:
    """Return A^-1(B(x))."""
    return 2 / torch.pi * torch.acos(fixed_image(x).clamp(-1, 1))


def warp_of_moving(x: torch.Tensor) -> torch.Tensor:
    """Return W(x), a diffeomorphism of [0, 1]."""
    return x + 0.12 * torch.sin(torch.pi * x) - 0.05 * torch.sin(2 * torch.pi * x)


def warp_of_fixed(x: torch.Tensor) -> torch.Tensor:
    """Return U(x), another one."""
    return x**1.5


def register(moving: torch.Tensor, fixed: torch.Tensor, at: torch.Tensor, width: float, seed: int) -> torch.Tensor:
    """Answer for each fixed value `(Q,)` where it lies among moving values `(K,)` sampled at points `(K,)`."""
    generator = torch.Generator().manual_seed(seed)
    frequency = width * torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    phase = 2 * torch.rand(FEATURES, generator=generator, dtype=torch.float64) - 1

    def features(values: torch.Tensor) -> torch.Tensor:
        return torch.sin(values[None, :, None] * frequency + phase)

    allowed = torch.ones(1, len(at), dtype=torch.bool)
    return attend(features(fixed), features(moving), at[None, :, None], allowed).flatten()


def errors(size: int, width: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the error of recovering `A^-1 o B`, and that of following W and U, at every fixed sample."""
    x = torch.arange(size, dtype=torch.float64) / size
    plain = register(moving_image(x), fixed_image(x), x, width, seed)
    moved = register(moving_image(warp_of_moving(x)), fixed_image(warp_of_fixed(x)), x, width, seed)
    # The law: W o Xi[A o W, B o U] = Xi[A, B] o U, and here both sides have the exact answer in common.
    return (plain - answer(x)).abs(), (warp_of_moving(moved) - answer(warp_of_fixed(x))).abs()


def main(
    sizes: tuple[int, ...] = (25, 50, 100, 200, 400, 800), draws: int = 20, output_dir: str = ""
) -> dict[str, float]:
    """Measure the error as resolution grows, for frequencies as they are and in proportion to it, and draw it.

    Args:
        sizes: numbers of samples.
        draws: random features, seeds 0 to draws - 1.
        output_dir: where the figure goes; beside the page if empty.

    Returns:
        Mean absolute error at each size, with frequencies in proportion to it.
    """
    print(f"{machine()}; {draws} draws of random features; mean (sd over draws) of the mean absolute error")
    print("| samples | 1 / (4 samples) | width 59 | width 0.59 samples | the same, under W and U | worst point |")
    print("|---|---|---|---|---|---|")
    table: dict[str, list[float]] = {"fixed": [], "scaled": [], "warped": []}
    for size in sizes:
        scaled = WIDTH * size / 100
        fixed = np.array([errors(size, WIDTH, seed)[0].mean().item() for seed in range(draws)])
        both = [errors(size, scaled, seed) for seed in range(draws)]
        plain, warped = (np.array([pair[k].mean().item() for pair in both]) for k in (0, 1))
        worst = np.median([pair[0].max().item() for pair in both])
        for name, values in (("fixed", fixed), ("scaled", plain), ("warped", warped)):
            table[name].append(values.mean())
        cells = [f"{v.mean():.5f} ({v.std(ddof=1):.5f})" for v in (fixed, plain, warped)]
        print(f"| {size} | {0.25 / size:.5f} | " + " | ".join(cells) + f" | {worst:.4f} |")
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = torch.arange(100, dtype=torch.float64) / 100
    left.plot(x, moving_image(x), label="moving A")
    left.plot(x, fixed_image(x), label="fixed B")
    left.plot(x, answer(x), "k", lw=3, alpha=0.3, label="exact, A$^{-1}$ o B")
    left.plot(x, register(moving_image(x), fixed_image(x), x, WIDTH, 0), "r--", label="attention, 100 samples")
    left.set(xlabel="x")
    left.legend(fontsize=8)
    right.loglog(sizes, table["fixed"], marker=".", label="frequencies of width 59")
    right.loglog(sizes, table["scaled"], marker=".", label="in proportion to samples")
    right.loglog(sizes, table["warped"], marker=".", label="the same, images under W and U")
    right.loglog(sizes, [0.25 / size for size in sizes], "k:", label="1 / (4 samples): nearest sample")
    right.set(xlabel="samples", ylabel="mean absolute error")
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.minorticks_off()
    right.legend(fontsize=8)
    save(figure, "deck_diffeomorphism.png", output_dir)
    return dict(zip(map(str, sizes), table["scaled"]))


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
