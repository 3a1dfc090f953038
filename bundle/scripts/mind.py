"""A similarity that compares the structure around each voxel, not intensities: for images of different contrast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch.nn.modules.loss import _Loss

from .fields import full_precision

__all__ = ["MINDSSCLoss", "check_weight"]

_CLAMP = (1e-3, 1e3)  # of the variance, in units of its mean over an image: flat regions divide by no less


def check_weight(weight: torch.Tensor | None, image: torch.Tensor, owner: str) -> None:
    """Refuse a map of weights that does not fit the images that it weights.

    Args:
        weight: `(B, 1, *spatial)`, or None for no weights.
        image: `(B, C, *spatial)`.
        owner: who asks, for the message.

    Raises:
        ValueError: if the shape is another one, or values are negative, not finite, or all zero.

    Example:
        >>> check_weight(torch.ones(2, 1, 4, 4), torch.rand(2, 3, 4, 4), "I")
    """
    if weight is None:
        return
    if weight.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"{owner} expects weight of shape (B, 1, *spatial) for images of shape {list(image.shape)}, "
            f"got {list(weight.shape)}."
        )
    least, most = float(weight.detach().min()), float(weight.detach().max())
    if not 0 <= least <= most < float("inf") or most == 0:
        raise ValueError(
            f"{owner} expects weight to be finite, not negative and somewhere above 0, got values from {least:g} to "
            f"{most:g}."
        )


def _neighbor_pairs(dims: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the pairs of face neighbors of a voxel that lie sqrt(2) apart: 4 in 2D, 12 in 3D, as offsets."""
    # Sorted, so that of the two pairs with the steps `b - a` and `a - b` both take the same one.
    axes = sorted(tuple(sign * (k == axis) for k in range(dims)) for axis in range(dims) for sign in (-1, 1))
    return [(a, b) for a, b in combinations(axes, 2) if sum((p - q) ** 2 for p, q in zip(a, b)) == 2]


def _cut(maps: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Cut a block of the given shape out of `(B, C, *larger shape)`, `offset` voxels from the middle."""
    for axis, (step, size) in enumerate(zip(offset, shape)):
        maps = maps.narrow(2 + axis, (maps.shape[2 + axis] - size) // 2 + step, size)
    return maps


def _box_mean(maps: torch.Tensor, radius: int) -> torch.Tensor:
    """Average over a box around each voxel of `(B, C, *spatial)`; every axis shortens by `2 * radius`.

    As for the window of local correlation, products with banded matrices are several times as fast as pooling.
    """
    for axis in range(2, maps.dim()):
        size, rest = maps.shape[axis], maps.shape[axis + 1 :]
        index = torch.arange(size, device=maps.device)
        lag = index - index[: size - 2 * radius, None]
        band = ((lag >= 0) & (lag <= 2 * radius)).to(maps.dtype) / (2 * radius + 1)
        # The last axis needs no third dimension: one large product in place of many matrix-vector ones.
        averaged = band @ maps.reshape(-1, size, rest.numel()) if rest else maps.reshape(-1, size) @ band.T
        maps = averaged.reshape(*maps.shape[:axis], size - 2 * radius, *rest)
    return maps


class MINDSSCLoss(_Loss):
    """Mean squared difference of two images' self-similarity descriptors (MIND-SSC).

    The descriptor of a voxel compares patches around it with one another, within one image: for each pair `(a, b)` of
    its face neighbors, `dilation` voxels away, that lie at a right angle (4 pairs in 2D, 12 in 3D) it holds
    `exp(-(d_ab - min d) / v)`, where `d_ab` is the mean over a box of `(I(x + a) - I(x + b))^2`, `min d` the least of
    these and `v` their mean. What a linear change of intensities does to `d`, inverted contrast included, cancels in
    the quotient, so images of different modalities can be compared.

    `v` is kept between 0.001 and 1000 times its mean over the image, so that flat regions, whose `d` are all 0, have
    the descriptor 1. Images continue outside their grid as their border values.

    Reference: Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using
    Self-similarities", MICCAI 2013, https://doi.org/10.1007/978-3-642-40811-3_24.

    Args:
        radius: of the box in voxels; it is `2 * radius + 1` voxels wide.
        dilation: distance of the neighbors in voxels.

    Raises:
        ValueError: if `radius` is negative or `dilation` less than 1.

    Example:
        >>> image, loss = torch.rand(1, 1, 16, 16), MINDSSCLoss()
        >>> loss(image, 0.9 - 0.5 * image).item() < 1e-6 < loss(image, image.flip(2)).item()
        True
    """

    def __init__(self, radius: int = 2, dilation: int = 2) -> None:
        super().__init__()
        if radius < 0 or dilation < 1:
            raise ValueError(f"MINDSSCLoss expects radius >= 0 and dilation >= 1, got {radius} and {dilation}.")
        self.radius = radius
        self.dilation = dilation

    def descriptor(self, image: torch.Tensor) -> torch.Tensor:
        """Describe the surroundings of each voxel.

        Args:
            image: `(B, C, *spatial)` with two or three spatial axes; channels are described one by one.

        Returns:
            `(B * C, 4 or 12, *spatial)` in float32 or better, from 0 to 1; the largest is 1 at every voxel.

        Raises:
            ValueError: if the shape is not of that form.
        """
        if image.dim() not in (4, 5):
            raise ValueError(
                f"MINDSSCLoss expects images (B, C, *spatial) with 2 or 3 spatial axes, got {list(image.shape)}."
            )
        dims = image.dim() - 2
        # Half precision cannot hold the squares of small differences: leave autocast.
        with torch.autocast(image.device.type, enabled=False):
            image = full_precision(image).reshape(-1, 1, *image.shape[2:])
            shape = image.shape[2:]
            padded = F.pad(image, [2 * self.dilation + self.radius] * (2 * dims), mode="replicate")
            means: dict[tuple[int, ...], torch.Tensor] = {}
            distances = []
            for a, b in _neighbor_pairs(dims):
                # Two pairs share each step between neighbors, up to a shift, and so the costly box mean.
                step = tuple(self.dilation * (q - p) for p, q in zip(a, b))
                if step not in means:
                    reach = [size + 2 * (self.dilation + self.radius) for size in shape]
                    change = _cut(padded, [0] * dims, reach) - _cut(padded, step, reach)
                    means[step] = _box_mean(change.square(), self.radius)
                distances.append(_cut(means[step], [self.dilation * p for p in a], shape))
            distance = torch.cat(distances, dim=1)
            distance = distance - distance.amin(dim=1, keepdim=True)
            variance = distance.mean(dim=1, keepdim=True)
            # An image without any structure has variance 0 everywhere: a tiny number avoids 0 / 0.
            level = variance.mean(dim=list(range(1, dims + 2)), keepdim=True).clamp(min=1e-20)
            variance = torch.minimum(torch.maximum(variance, _CLAMP[0] * level), _CLAMP[1] * level)
            return torch.exp(-distance / variance)

    def forward(self, pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Compare two images on one grid; the order of the two does not matter.

        Args:
            pred: `(B, C, *spatial)` with two or three spatial axes; channels are compared one by one.
            target: the same shape.
            weight: `(B, 1, *spatial)`, not negative: how much each voxel counts; all the same if left out.

        Returns:
            scalar, no unit, from 0 (match) to 1.

        Raises:
            ValueError: if the shapes differ or are not of that form, or for a weight that is no such map.
        """
        if pred.shape != target.shape:
            raise ValueError(
                f"MINDSSCLoss expects two images of one shape, got {list(pred.shape)} and {list(target.shape)}."
            )
        check_weight(weight, pred, "MINDSSCLoss")
        difference = (self.descriptor(pred) - self.descriptor(target)).square().mean(dim=1)
        if weight is None:
            return difference.mean()
        weight = full_precision(weight).expand(pred.shape).reshape(difference.shape)
        return (weight * difference).sum() / weight.sum()
