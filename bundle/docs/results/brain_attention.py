"""Train `brain`: teach its attention which points correspond. The rest of the network has no weights.

    python bundle/docs/results/brain_attention.py brain_synthseg_labels_2mm output/brain/model.pt --steps 3000

Each step deforms and paints one label map twice, as `brain.json` does but turned further and at 4 mm, so that the true
partner of every voxel is known. Features of the pooled images are compared as attention compares them, and the
cross-entropy of its softmax, in both directions, is minimized: a loss with a slope even while the attention still looks
everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch.nn import functional as F

from equireg.networks import CARL
from equireg.progress import progress
from equireg.weights import save_atomically

CONFIGS = Path(__file__).parents[2] / "configs"
POOL = 2  # images are learned from at 4 mm
SIGMA = 0.6  # how far from its true partner a voxel may look, standard deviation, pooled voxels


def brain_network() -> CARL:
    """Return the network of `brain`, untrained."""
    return CARL(
        3,
        feature_channels=64,
        factor=6,
        nesting="attention",
        refinement_channels=(16, 32, 64, 96, 96),
        padding=1,
        affine_rounds=5,
        affine_turns="grid",
        flow_rounds=(4, 4, 6),
    )


def _parser(dataset_dir: str, turn: float, seed: int) -> ConfigParser:
    """Return the configuration of the U-Net's training, for pairs of one label map alone, with room to turn it."""
    parser = ConfigParser()
    parser.read_config([CONFIGS / f"{name}.json" for name in ("train", "brain")])
    parser["dataset_dir"], parser["seed"], parser["bundle_root"] = dataset_dir, seed, str(CONFIGS.parent)
    parser["pool"], parser["shape"] = POOL, [max(parser["shape"])] * 3
    parser["train"]["dataset"]["load"] = "@load_transform"
    parser["train"]["random_transforms"][:1] = []  # the whole image, not a patch
    parser["train"]["random_transforms"][0].update(same=1.0, turn=turn, scale=0.08, sigma=[0.05, 0.02])
    parser["train"]["carried_transforms"] = []
    return parser


def pooled(item: dict[str, torch.Tensor], key: str, factor: int, start: list[int]) -> tuple[torch.Tensor, ...]:
    """Average an image, its voxels' places and its content over blocks that begin anywhere.

    Args:
        item: the images of a pair, `(1, *shape)`, and beside each its places, `(D + 1, *shape)`, in voxels.
        key: which of them.
        factor: voxels of a block along each axis.
        start: empty voxels before the first of the image.

    Returns:
        image `(1, *pooled)`, places in pooled voxels `(D, *pooled)` and the share of content `(*pooled,)`.
    """
    image, places = item[key], item[f"{key}_coordinates"][:-1]
    ends = [-(size + factor - 1) % factor + factor - 1 - begin for size, begin in zip(image.shape[1:], start)]
    pads = [value for begin, end in zip(reversed(start), reversed(ends)) for value in (begin, end)]
    content = (image != 0).float()
    stack = F.avg_pool3d(F.pad(torch.cat([image, places * content, content]), pads), factor)
    return stack[:1], stack[1:-1] / stack[-1].clamp(min=1e-3) / factor, stack[-1]


def correspondence(features: torch.Tensor, places: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the attention between two images, in both directions.

    Args:
        features: `(2, F, *pooled)`.
        places: `(2, D, *pooled)`, what each voxel shows, pooled voxels.
        shares: `(2, *pooled)`, share of content; voxels with less than half take no part.

    Returns:
        scalar; 0 where no voxel has a partner.
    """
    (moving, there), (fixed, here) = (
        (feature.flatten(1)[:, keep].T, place.flatten(1)[:, keep].T)
        for feature, place, keep in zip(features, places, (shares > 0.5).flatten(1))
    )
    logits, squares = fixed @ moving.T, torch.cdist(here, there).square()
    losses = [features.sum() * 0]
    if min(logits.shape) == 0:
        return losses[0]
    for products, distances in ((logits, squares), (logits.T, squares.T)):
        has_partner = distances.amin(dim=1) < 1.0
        target = torch.softmax(-distances[has_partner] / (2 * SIGMA**2), dim=1)
        if has_partner.any():
            losses.append(F.cross_entropy(products[has_partner], target) / 2)
    return torch.stack(losses).sum()


def items(parser: ConfigParser) -> Iterator[dict[str, torch.Tensor]]:
    """Yield training pairs without end."""
    dataset = parser.get_parsed_content("train#dataset")
    generator = np.random.default_rng(parser["seed"])
    while True:
        yield {key: value.as_tensor() for key, value in dataset[int(generator.integers(len(dataset)))].items()}


def main(
    dataset_dir: str,
    output: str,
    steps: int = 3000,
    learning_rate: float = 1e-3,
    pairs: int = 2,
    turn: float = 0.5,
    seed: int = 1,
) -> None:
    """Train, and write the weights.

    Args:
        dataset_dir: folder of label maps.
        output: where the weights go, every hundred steps.
        steps: how long to train.
        learning_rate: Adam's at the start; it falls along a cosine.
        pairs: pairs of a step.
        turn: standard deviation of the turn of each image about each axis, radians.
        seed: of everything random.
    """
    set_determinism(seed)
    sys.path.insert(0, str(CONFIGS.parent))  # where the configurations find `scripts`
    parser = _parser(dataset_dir, turn, seed)
    network = brain_network()
    pool = network.attention_stage().net
    learned = pool.factor // POOL  # voxels of a block in the images that are learned from
    optimizer = torch.optim.Adam(pool.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 100)
    generator, source = np.random.default_rng(seed), items(parser)
    for step in progress(range(1, steps + 1), "training", "step"):
        batch = [
            pooled(item, key, learned, generator.integers(0, learned, 3).tolist())
            for item in (next(source) for _ in range(pairs))
            for key in ("moving", "fixed")
        ]
        images, places, shares = (torch.stack(parts) for parts in zip(*batch))
        features = F.pad(pool.net._encode(images)[0], [-pool.net.padding] * 6)
        loss = torch.stack(
            [correspondence(features[k : k + 2], places[k : k + 2], shares[k : k + 2]) for k in range(0, 2 * pairs, 2)]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            save_atomically(network.state_dict(), output)


if __name__ == "__main__":
    fire.Fire(main)
