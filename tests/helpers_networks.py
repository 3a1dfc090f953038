"""What the tests of the networks share: content placed on canvases, and networks in which every number is random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from equireg.networks import CoordinateAttention, DisplacementUNet

SMALL = {"feature_channels": 8, "refinement_channels": (4, 8)}


def content(*size: int, seed: int = 0, channels: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32):
    """Return random values from 0.1 to 1 without structure, `(batch, channels, *size)`: no background among them."""
    values = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.1 + 0.9 * values).to(dtype)


def blocks(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return content `(1, 1, *size)` of blocks of three voxels, near 0.05 or 1: pooling leaves its contrast."""
    coarse = content(*[-(-n // 3) for n in size], seed=seed, dtype=torch.float64)
    values = content(*size, seed=seed + 1, dtype=torch.float64) * 0.1
    for axis in range(2, coarse.dim()):
        coarse = coarse.repeat_interleave(3, dim=axis).narrow(axis, 0, size[axis - 2])
    return (values + 0.9 * (coarse > 0.55)).to(dtype)


def place(values: torch.Tensor, shape: Sequence[int], at: Sequence[int]) -> torch.Tensor:
    """Put content on a canvas of background, its first voxel at `at`."""
    canvas = values.new_zeros(*values.shape[:2], *shape)
    where = tuple(slice(start, start + size) for start, size in zip(at, values.shape[2:]))
    assert canvas[(..., *where)].shape == values.shape, "the content must fit on the canvas"
    canvas[(..., *where)] = values
    return canvas


def moved_field(ddf: torch.Tensor, shape: Sequence[int], by: Sequence[int]) -> torch.Tensor:
    """Return `ddf(x - by)` on a canvas of another shape, the nearest voxel's value where `x - by` lies outside."""
    index = [np.clip(np.arange(n) - s, 0, size - 1) for n, s, size in zip(shape, by, ddf.shape[2:])]
    return torch.stack([torch.stack([c[np.ix_(*index)] for c in sample]) for sample in ddf])


def vector(by: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """View a translation as `(1, D, 1, ...)`."""
    return torch.tensor(by, dtype=like.dtype).reshape(1, -1, *[1] * (like.dim() - 2))


def randomized(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Draw all numbers, those that start at a constant as well, so that answers are far from trivial; eval mode.

    Fresh weights give features that hardly differ from voxel to voxel, so that attention answers the content's center
    and follows it trivially. Stronger weights, and statistics of random content, make every voxel look its own way.
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, DisplacementUNet):
                module.head.weight.copy_(nn.init.normal_(torch.empty(module.head.weight.shape), std=0.03))
                nn.init.normal_(module.head.bias, std=0.03)
            if hasattr(module, "running_var"):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for module in net.modules():
            if isinstance(module, CoordinateAttention):
                for name, weight in module.named_parameters():
                    if weight.dim() > 2 and "conv" in name:
                        weight.copy_(nn.init.kaiming_normal_(torch.empty(weight.shape)))  # drawn in any layout alike
                image = content(*[7] * module.spatial_dims, channels=module.in_channels, batch=2)
                for _ in range(20):
                    module.encoder.train()(image, torch.ones_like(image[:, :1]))
    return net.to(dtype).eval()


def count(net: nn.Module) -> int:
    """Count the parameters."""
    return sum(p.numel() for p in net.parameters())


def sharpened(net: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> nn.Module:
    """Take from the features of a randomized network what they have in common on a pair of images.

    Averaged over many turns, random features keep little but their mean, and attention would answer with the content's
    center, which follows turns trivially. With the mean gone, voxels look their own way again.
    """
    [attention] = [module for module in net.modules() if isinstance(module, CoordinateAttention)]
    block, found = attention.encoder.block3, []

    def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        features = outputs[0] + outputs[1].reshape(1, -1, *[1] * attention.spatial_dims)
        found.append(features.movedim(1, -1)[inputs[2][:, 0] > 0])

    handle = block.register_forward_hook(collect)
    with torch.no_grad():
        net(moving, fixed)
        handle.remove()
        block.conv3.bias -= torch.cat(found).mean(dim=0)
    return net


def spread(ddf: torch.Tensor) -> float:
    """Return how far apart the points are that fixed voxels are sent to: 0 if all go to one place, voxels."""
    points = ddf + torch.stack(torch.meshgrid(*[torch.arange(n) for n in ddf.shape[2:]], indexing="ij"))
    return points.flatten(2).std(dim=2).max().item()
