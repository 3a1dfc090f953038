"""Section 6 of the deck's page: retinal vessels, five train-to-test pairs, three networks, several seeds.

    python bundle/docs/deck/retina.py --dataset_dir DIR --seeds 3

with a folder that holds `retina_chase28/observer1/*.png` and `retina_hrf/*.png` trains every network that the results
file does not have yet, adds one row per trained network and test variant to it, and prints the table. A killed run goes
on where it stopped, at the cost of the training it was in.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from common import machine, save
from matplotlib.figure import Figure
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize, ResizeWithPadOrCrop
from monai.utils import set_determinism
from torch import nn
from torch.nn.functional import pad
from torch.optim.lr_scheduler import LambdaLR

from equireg.augmentation import RandWarpPaird
from equireg.data import PairSampler, WarpedPairDataset
from equireg.fields import compose, identity_grid, warp
from equireg.handlers import cosine_decay
from equireg.lists import image_files
from equireg.losses import DiffusionLoss, LocalCorrelationLoss, RegistrationLoss
from equireg.metrics import folding_fraction
from equireg.networks import CoordinateAttention, DisplacementUNet, Downsample, PairNetwork, TwoStep
from equireg.transforms import NormalizeContentd, StackPaird

HERE = Path(__file__).resolve().parent
NETWORKS = ("U-Net only", "attention only", "hybrid")
VARIANTS = ("baseline", "shift", "scale shift")
# What each network is trained on and tested on, as in the deck and in the CARL paper.
CELLS = (
    ("baseline", "baseline"),
    ("shift", "shift"),
    ("baseline", "shift"),
    ("scale shift", "scale shift"),
    ("baseline", "scale shift"),
)
CONTENT, INNER, GAP, ZOOM = 48, 56, 14, 0.8  # pixels; the paper's gap is 50 of 196 pixels, its zoom 0.8
THRESHOLD = 0.2  # of the moved and the fixed mask, as in the paper
EPOCHS, STEPS, BATCH, RATE = 14, 50, 4, 3e-4
UNET_CHANNELS = (16, 32, 64, 96, 96)
FIELDS = ("network", "features", "seed", "train", "test", "pairs", "dice", "dice_sd", "folding", "steps", "seconds")


class Arrange:
    """Bring a warped pair onto the canvas of a variant: `GAP` pixels longer than the eye along the first axis.

    "baseline" leaves both eyes at the top; "shift" puts the moving one at the bottom; "scale shift" also shrinks the
    fixed one to `ZOOM` about its center.
    """

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self, item: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return `moving` and `fixed`, `(1, INNER + GAP, INNER)`."""
        image, ddf = item["image"], item["true_ddf"].unsqueeze(0)
        if self.variant == "scale shift":
            from_center = identity_grid([INNER, INNER]) - (INNER - 1) / 2
            ddf = compose(ddf, from_center * (1 / ZOOM - 1))
        fixed = warp(image.unsqueeze(0), ddf, padding="zeros")[0]
        above = 0 if self.variant == "baseline" else GAP
        return {"moving": pad(image, [0, 0, above, GAP - above]), "fixed": pad(fixed, [0, 0, 0, GAP])}


def eyes(dataset_dir: str, split: str) -> list[dict[str, torch.Tensor]]:
    """Read the vessel masks of a split, `CONTENT` pixels along the longer side, `(1, INNER, INNER)` each."""
    patterns = ("retina_chase28/observer1/*.png", "retina_hrf/*.png")
    files = image_files(dataset_dir, patterns, r"(Image_\d+|\d+_[a-z]+)", split)
    load = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Resize(CONTENT, size_mode="longest", mode="area"),
            ResizeWithPadOrCrop((INNER, INNER)),
        ]
    )
    return [{"image": load(file["image"]).as_tensor()} for file in files]


def pairs(images: list[dict[str, torch.Tensor]], variant: str, seed: int, length: int) -> WarpedPairDataset:
    """Make the pairs of a variant: item `k` warps image `k` modulo their number."""
    transform = Compose([Arrange(variant), NormalizeContentd(("moving", "fixed")), StackPaird()])
    return WarpedPairDataset(images, RandWarpPaird(), transform=transform, length=length, seed=seed)


def build(name: str, features: int) -> PairNetwork:
    """Build one of the three networks; "U-Net only" has a U-Net at a quarter of the resolution for attention."""

    def unet() -> nn.Module:
        return DisplacementUNet(2, channels=UNET_CHANNELS)

    if name == "U-Net only":
        first = Downsample(unet(), 4)
    else:
        first = Downsample(CoordinateAttention(2, feature_channels=features, padding=1), 4, content_phase=True)
    return PairNetwork(first if name == "attention only" else TwoStep(TwoStep(first, unet()), unet()))


def train(name: str, features: int, images: list[dict[str, torch.Tensor]], variant: str, seed: int) -> PairNetwork:
    """Train a network from scratch on one variant."""
    set_determinism(seed)
    network = build(name, features)
    fit(network, pairs(images, variant, seed, 1_000_000), seed)
    return network.eval()


def fit(network: nn.Module, data: WarpedPairDataset, seed: int) -> None:
    """Train a network in place, on pairs that are drawn from a data set."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = LambdaLR(optimizer, lambda epoch: cosine_decay(epoch, EPOCHS))
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(data, batch_size=BATCH, sampler=PairSampler(data, STEPS * BATCH, seed)),
        network=network,
        optimizer=optimizer,
        loss_function=RegistrationLoss(LocalCorrelationLoss(sigma=3.0), DiffusionLoss(), regularity_weight=0.3),
        train_handlers=[LrScheduleHandler(schedule, print_lr=False)],
        decollate=False,
    )
    trainer.run()


class Unregistered(nn.Module):
    """Answer no displacement, and the moving image as it is."""

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """Return `(B, 3, *shape)` for a stacked pair, as `PairNetwork` does."""
        return torch.cat([torch.zeros_like(pair), pair[:, :1]], dim=1)


@torch.inference_mode()
def evaluate(network: nn.Module, images: list[dict[str, torch.Tensor]], variant: str, warps: int) -> dict[str, Any]:
    """Score a network on `warps` fixed warps of every eye."""
    scores, folds = [], []
    for item in (data := pairs(images, variant, 2_000_003, warps * len(images))):
        pair = item["image"].unsqueeze(0)
        pred = network(pair)
        a, b = pred[:, 2:] > THRESHOLD, pair[:, 1:] > THRESHOLD
        scores.append((2 * (a & b).sum() / (a.sum() + b.sum())).item())
        folds.append(folding_fraction(pred[:, :2]).item())
        if len(scores) == len(data):
            break
    return {"pairs": len(scores), "dice": np.mean(scores), "dice_sd": np.std(scores, ddof=1), "folding": np.mean(folds)}


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file, none if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]], fields: tuple[str, ...] = FIELDS) -> None:
    """Add rows to a results file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(
    dataset_dir: str,
    seeds: int = 3,
    networks: tuple[str, ...] = NETWORKS,
    variants: tuple[str, ...] = VARIANTS,
    features: int = 128,
    warps: int = 4,
    results: str = str(HERE / "data" / "retina.csv"),
    weights_dir: str = "output/deck_retina",
    output_dir: str = "",
) -> None:
    """Train what is missing, evaluate it on every variant, and print the table.

    Args:
        dataset_dir: folder of the vessel masks.
        seeds: networks of each kind and training variant.
        networks: which of the three networks.
        variants: which training variants.
        features: width of the attention's features.
        warps: random warps of every test eye.
        results: CSV file, read and added to.
        weights_dir: where trained weights go; an empty text keeps none.
        output_dir: where the figure goes; beside the page if empty.
    """
    path = Path(results)
    training, test = eyes(dataset_dir, "training"), eyes(dataset_dir, "test")
    training += [{"image": item["image"].flip(1)} for item in training]  # with its vertical flip, as in the paper
    for seed in range(seeds):
        for variant in variants:
            for name in networks:
                done = {(r["network"], r["features"], r["seed"], r["train"]) for r in read(path)}
                if (name, str(features), str(seed), variant) in done:
                    continue
                start = time.process_time()
                network = train(name, features, training, variant, seed)
                seconds = time.process_time() - start
                row = {"network": name, "features": features, "seed": seed, "train": variant, "steps": EPOCHS * STEPS}
                rows = [
                    {**row, "test": case, "seconds": round(seconds), **evaluate(network, test, case, warps)}
                    for case in VARIANTS
                ]
                append(path, rows)
                print(
                    ", ".join(f"{r['test']} {r['dice']:.3f}" for r in rows), f"<- {variant}, {name}, {seed}", flush=True
                )
                if weights_dir:
                    folder = Path(weights_dir)
                    folder.mkdir(parents=True, exist_ok=True)
                    torch.save(
                        network.state_dict(), folder / f"{name}_{variant}_{features}_{seed}.pt".replace(" ", "-")
                    )
    unregistered = [f"{v} {evaluate(Unregistered(), test, v, warps)['dice']:.3f}" for v in VARIANTS]
    print(f"{machine()}; Dice unregistered: {', '.join(unregistered)}")
    table(read(path))
    draw(read(path), dataset_dir, output_dir)


def scores(rows: list[dict[str, str]], name: str, cell: tuple[str, str], features: int = 128) -> np.ndarray:
    """Return the mean Dice of each trained network of a kind on a train-to-test pair, a value per seed."""
    wanted = (name, *cell, str(features))
    return np.array([float(r["dice"]) for r in rows if (r["network"], r["train"], r["test"], r["features"]) == wanted])


def describe(values: np.ndarray) -> str:
    """Write mean, spread over seeds and their number."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if len(values) else ""
    return f"{values.mean():.3f} ({values.std(ddof=1):.3f}; {len(values)})"


def table(rows: list[dict[str, str]]) -> None:
    """Print each cell's mean Dice, its standard deviation over seeds and their number, and whether the claim holds."""
    print("| train -> test | " + " | ".join(NETWORKS) + " |\n|---|---|---|---|")
    for cell in CELLS:
        print(f"| {cell[0]} -> {cell[1]} | " + " | ".join(describe(scores(rows, n, cell)) for n in NETWORKS) + " |")
    for features in sorted({int(r["features"]) for r in rows} - {128}):
        for name in NETWORKS[1:]:
            print(f"{features} features, {name}, {CELLS[0]}: {describe(scores(rows, name, CELLS[0], features))}")
    for claim, holds in claims(rows).items():
        print(f"{'pass' if holds else 'FAIL'}: {claim}")


def claims(rows: list[dict[str, str]]) -> dict[str, bool]:
    """Say of each part of the deck's claim whether it holds: "as well" is to 0.03 Dice, "cannot" 0.1 or more below."""

    def mean(name: str, cell: tuple[str, str]) -> float:
        values = scores(rows, name, cell)
        return float(values.mean()) if len(values) else float("nan")

    same = {}
    for name in ("attention only", "hybrid"):
        plain = mean(name, CELLS[0])
        same[name] = [abs(mean(name, cell) - plain) <= 0.03 for cell in CELLS[1:]]
    unet = [mean("U-Net only", CELLS[0]) - mean("U-Net only", cell) >= 0.1 for cell in CELLS[1:]]
    return {
        "attention only solves shifted pairs as well as unshifted ones, trained on either": all(
            same["attention only"][:2]
        ),
        "hybrid does": all(same["hybrid"][:2]),
        "attention only solves scaled and shifted pairs as well, trained on either": all(same["attention only"][2:]),
        "hybrid does so, too": all(same["hybrid"][2:]),
        "U-Net only cannot register shifted pairs, even if trained on them": all(unet[:2]),
        "nor scaled and shifted ones": all(unet[2:]),
    }


def draw(rows: list[dict[str, str]], dataset_dir: str, output_dir: str) -> None:
    """Draw a test pair of each variant, and the scores: a dot for each trained network, a line at their mean."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.9])
    images = eyes(dataset_dir, "test")
    for panel, variant in zip(left.subplots(1, 3), VARIANTS):
        pair = pairs(images, variant, 2_000_003, 1)[0]["image"]
        panel.imshow(torch.stack([pair[0], pair[1], pair[0]], dim=-1).numpy())
        panel.set(xticks=[], yticks=[])
        panel.set_title(variant, fontsize=9)
    panel = right.subplots()
    for k, name in enumerate(NETWORKS):
        for place, cell in enumerate(CELLS):
            values = scores(rows, name, cell)
            x = place + 0.22 * (k - 1)
            panel.plot(np.full(len(values), x), values, "o", ms=4, color=f"C{k}", label=None if place else name)
            if len(values):
                panel.hlines(values.mean(), x - 0.09, x + 0.09, color=f"C{k}")
    panel.set(ylim=(0, 0.9), ylabel="Dice", xlim=(-0.5, len(CELLS) - 0.5))
    panel.set_xticks(range(len(CELLS)), ["\n-> ".join(cell) for cell in CELLS], fontsize=8)
    panel.legend(fontsize=8, ncols=3)
    panel.grid(alpha=0.3, axis="y")
    save(figure, "deck_retina.png", output_dir)


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
