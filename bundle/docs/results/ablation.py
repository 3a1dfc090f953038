"""Train networks for the same computing time, and compare them on the same pairs.

    python bundle/docs/results/ablation.py Task04_Hippocampus --minutes 25

The network of `deck.json` on real images; two that differ from it in one thing, synthetic anatomy alone, and a U-Net in
place of its attention; and MONAI's `VoxelMorph`. All start from scratch, with one loss, seed and learning rate, and see
the centers of both images together. Each answers pairs as they are and with the moving image shifted, alone and with
six rounds of optical flow behind it. Writes the weights, which are not trained again where they exist, `ablation.csv`,
a row per pair and network, and `.json`, the summary.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
from compare import DATA, PAIR_KEYS, common_labels, measure, pairs, provenance, summarize, table
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.handlers import LrScheduleHandler
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from monai.transforms import ResizeWithPadOrCropd
from monai.utils import set_determinism
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from equireg.handlers import StopOnNonFiniteLoss
from equireg.networks import LucasKanade, TwoStep
from equireg.weights import read_tensors, save_atomically

BUNDLE = Path(__file__).resolve().parents[2]
# What differs from train.json and deck.json: overlays, and whether images are real.
NETWORKS = {
    "attention": ((), True),
    "attention, synthetic anatomy": ((), False),
    "U-Net in place of attention": (("unet",), True),
    "VoxelMorph": ((), True),
}
LOSS = {"regularity_weight": 1.0, "consistency_weight": 1.0, "window_sigma": 4.0}  # the last stage of `hippocampus`
FLOW_ROUNDS = 6
MEASURES = ("dice_anterior", "dice_posterior", "dice", "folding")


class FromVoxelMorph(nn.Module):
    """Call MONAI's `VoxelMorph`, with the widths of its publication, for the ddf alone."""

    divisor = 16  # of the sizes it takes

    def __init__(self) -> None:
        super().__init__()
        self.net = VoxelMorph(VoxelMorphUNet(3, 2, 32, (16, 32, 32, 32, 32, 32), (16, 16)), spatial_dims=3)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Take images `(B, 1, *shape)`, padded here to one shape; return the ddf `(B, 3, *fixed shape)`, voxels."""
        sizes = [-(-max(pair) // self.divisor) * self.divisor for pair in zip(moving.shape[2:], fixed.shape[2:])]
        padded = [
            F.pad(image, [n for size, own in zip(sizes[::-1], image.shape[:1:-1]) for n in (0, size - own)])
            for image in (moving, fixed)
        ]
        return self.net(*padded)[1][(..., *(slice(size) for size in fixed.shape[2:]))]


def centered(pair: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad the images of a pair, each `(1, *its shape)`, to one shape that holds both, their centers together.

    The bundle's own training pads at the end. To attention this makes no difference.
    """
    images = {key: pair[key] for key in ("moving", "fixed")}
    shape = [max(sizes) for sizes in zip(*(image.shape[1:] for image in images.values()))]
    fit: Any = ResizeWithPadOrCropd(tuple(images), shape)
    return {**pair, **fit(images)}


def configuration(name: str, dataset_dir: str, seed: int) -> ConfigParser:
    """Return the bundle's training configuration of one of the `NETWORKS`, without what validates or writes."""
    overlays, real = NETWORKS[name]
    set_determinism(seed)
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / f"{overlay}.json" for overlay in ("train", "deck", *overlays)])
    parser.update({**LOSS, "bundle_root": str(BUNDLE), "seed": seed, "dataset_dir": dataset_dir if real else ""})
    # 10 steps are an epoch, after which the learning rate changes; the time ends the run.
    parser.update({"flow_rounds": [], "iterations": 10, "epochs": 10**6, "train#handlers": []})
    parser["train"]["pair_transforms"].insert(0, centered)
    if name == "VoxelMorph":
        parser["network_def"]["net"] = FromVoxelMorph()
    return parser


def train(parser: ConfigParser, minutes: float, description: str) -> tuple[nn.Module, int]:
    """Train for some minutes of processor time; the learning rate falls along half a cosine.

    Returns:
        The network, called `net(moving, fixed)`, and the number of its steps.
    """
    trainer = parser.get_parsed_content("train#trainer")
    network = parser.get_parsed_content("network_def")
    start = time.process_time()
    bar = tqdm(total=100, desc=description, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", disable=None)

    def used(_: Any = None) -> float:
        return min(1.0, (time.process_time() - start) / (60 * minutes))

    def watch(engine: Engine) -> None:
        bar.update(100 * used() - bar.n)
        if used() == 1.0:
            engine.terminate()

    decay = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 0.5 * (1 + math.cos(math.pi * used())))
    LrScheduleHandler(decay, print_lr=False).attach(trainer)
    StopOnNonFiniteLoss().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, watch)
    trainer.run()
    bar.close()
    return network.net.eval(), trainer.state.iteration


def as_method(net: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]:
    """Ask a network of the images as they lie on their canvas: nothing crops them to what they show."""

    @torch.no_grad()
    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        ddf = net(moving, fixed)
        return lambda: ddf

    return register


def main(
    dataset_dir: str,
    minutes: float = 25.0,
    only: str = "",
    num_pairs: int = 50,
    split: str = "test",
    shift: int = 24,
    seed: int = 0,
    output_dir: str = "output/ablation",
) -> None:
    """Train what is not trained yet, register pairs with everything, print the tables and write them.

    Args:
        dataset_dir: Task04_Hippocampus with its `dataset.json`.
        minutes: of processor time, for each network.
        only: train this network alone, and compare nothing.
        num_pairs: how many ordered pairs of different subjects, of those of the split.
        split: "test" or "validation".
        shift: voxels by which the moving image lies further along the first axis, on a canvas longer by as much.
        seed: of everything random in training.
        output_dir: where everything is written.
    """
    if only and only not in NETWORKS:
        raise ValueError(f"expected one of {'; '.join(NETWORKS)}, got '{only}'.")
    torch.set_num_threads(1)
    sys.path.insert(0, str(BUNDLE))  # where the configurations find `scripts`
    folder, methods, steps, parameters = Path(output_dir), {}, {}, {}
    for name in [only] if only else NETWORKS:
        parser, path = configuration(name, dataset_dir, seed), folder / f"{name.replace(',', '').replace(' ', '_')}.pt"
        asked = {"minutes": minutes, "seed": seed, **LOSS}
        if not path.exists():
            net, count = train(parser, minutes, name)
            save_atomically({"net": net.state_dict(), "steps": count, "asked": asked}, path)
        saved = read_tensors(path, "file of weights")
        if saved["asked"] != asked:
            raise ValueError(f"{path} was trained with {saved['asked']}, not with {asked}.")
        net = parser.get_parsed_content("network_def").net.eval()
        net.load_state_dict(saved["net"])
        steps[name], parameters[name] = saved["steps"], sum(value.numel() for value in net.parameters())
        methods[name] = as_method(net)
        methods[f"{name}, then flow"] = as_method(TwoStep(net, LucasKanade(3, 1, FLOW_ROUNDS)).eval())
    if only:
        return
    data = DATA["hippocampus"]
    labels, dataset = common_labels(data, dataset_dir), pairs(data, dataset_dir, split, num_pairs)
    rows: list[dict[str, Any]] = []
    for number in tqdm(range(len(dataset)), desc="pairs", disable=None):
        for moved_by in (0, shift):
            images = {key: value[None] for key, value in dataset[number].items() if key in PAIR_KEYS}
            images |= {key: F.pad(images[key], (0, 0, 0, 0, moved_by, 0)) for key in ("moving", "moving_label")}
            for method, register in methods.items():
                values = measure(register, images, labels, data.regions)
                rows.append({"pair": number, "shift": moved_by, "method": method, **values})
    with (folder / "ablation.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = {by: summarize([row for row in rows if row["shift"] == by], MEASURES) for by in (0, shift)}
    report = {
        "data": f"{data.title}, {len(dataset)} pairs of the {split} split",
        "training": {"minutes": minutes, "seed": seed, **LOSS, "steps": steps, "parameters": parameters},
        **provenance(1),
        "summary": summary,
    }
    (folder / "ablation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for moved_by, found in summary.items():
        print(f"\nMoving image shifted by {moved_by} voxels:\n{table(found, MEASURES)}")


if __name__ == "__main__":
    fire.Fire(main)
