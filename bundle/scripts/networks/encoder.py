"""The feature encoder of coordinate attention, which answers to the content alone and not to the canvas around it.

An ordinary convolutional encoder sees where the canvas ends: with biases, zero padding differs from the network's own
response to background, and the difference creeps inwards by the receptive radius. Here a layer's input is carried as a
constant plus a deviation, `x = background + deviation`. The constant is what the layers so far answer to an infinite
background; it depends on the weights only. The deviation is reset to zero outside the active set after each layer, so
zero padding *is* the infinite background and the features depend on nothing but the content.
"""

from typing import Tuple

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from .active import check_precision
from .layout import channels_together
from .statistics import over_ranks

__all__ = ["Encoder", "to_length"]


class _TrackedConvolution(nn.Module):
    """A convolution on deviations: `active * (f(conv(d) + k) - f(k))` with `k` the response to background."""

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, dilation: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims](
            in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation
        )
        # The bias enters through the response to background, so the convolution itself runs without one.
        self.bias = nn.Parameter(conv.bias.detach())
        conv.register_parameter("bias", None)
        self.conv = conv
        self.activate = activate

    def forward(
        self, deviation: torch.Tensor, background: torch.Tensor, active: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        weight = self.conv.weight
        response = weight.flatten(2).sum(dim=2) @ background + self.bias
        if not self.activate:
            return self.conv._conv_forward(deviation, weight, None) * active, response
        answer = torch.relu(self.conv._conv_forward(deviation, weight, response))
        response = torch.relu(response)
        return (answer - _per_channel(response, deviation)) * active, response


class _TrackedNorm(nn.Module):
    """Batch normalization on deviations, its statistics taken over active voxels, see also `set_batch_statistics`.

    Parameters and buffers carry the names of `torch.nn.BatchNorm3d`; momentum and epsilon are torch's defaults. Where
    nothing is active there is nothing to learn from, and running statistics stay as they are.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    batch_statistics: str

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch_statistics = "local"
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum = 0.1
        self.eps = 1e-5

    def forward(
        self, deviation: torch.Tensor, background: torch.Tensor, active: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        mean, var = self.running_mean, self.running_var
        if self.training and self.batch_statistics != "frozen":
            axes = [0] + list(range(2, deviation.dim()))
            total = over_ranks(active.sum(), self.batch_statistics)
            count = total.clamp(min=1.0)
            # Deviations are zero outside the active set.
            offset = over_ranks(deviation.sum(dim=axes), self.batch_statistics) / count
            squares = (deviation - _per_channel(offset, deviation)) ** 2 * active
            var = over_ranks(squares.sum(dim=axes), self.batch_statistics) / count
            mean = background + offset
            with torch.no_grad():
                unbiased = var * count / (count - 1.0).clamp(min=1.0)
                old_mean, old_var = self.running_mean, self.running_var
                old_mean.lerp_(torch.where(total > 0, mean.to(old_mean.dtype), old_mean), self.momentum)
                old_var.lerp_(torch.where(total > 0, unbiased.to(old_var.dtype), old_var), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return deviation * _per_channel(scale, deviation), (background - mean) * scale + self.bias


class _ResidualBlock(nn.Module):
    """Normalize, convolve with dilations 1, 2 and 4, and add the normalized input."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.norm = _TrackedNorm(channels)
        self.conv1 = _TrackedConvolution(spatial_dims, channels, channels, dilation=1)
        self.conv2 = _TrackedConvolution(spatial_dims, channels, channels, dilation=2)
        self.conv3 = _TrackedConvolution(spatial_dims, channels, channels, dilation=4, activate=False)

    def forward(
        self, deviation: torch.Tensor, background: torch.Tensor, active: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        skip, skip_background = self.norm(deviation, background, active)
        deviation, background = self.conv1(skip, skip_background, active)
        deviation, background = self.conv2(deviation, background, active)
        deviation, background = self.conv3(deviation, background, active)
        return skip + deviation, skip_background + background


def _per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View a vector `(C,)` so that it spreads over `(B, C, *shape)`."""
    return vector.reshape([1, -1] + [1] * (like.dim() - 2))


def to_length(features: torch.Tensor, length: float) -> torch.Tensor:
    """Scale every feature of `(B, F, *shape)` to a length, or a little less.

    Example:
        >>> round(to_length(torch.ones(1, 4, 1), 4.0).norm().item(), 2)
        4.0
    """
    # The 0.001 keeps the gradient finite where a feature vanishes.
    return features * (length / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-3))


class Encoder(nn.Module):
    """Turn an image into a unit-length feature times four at every voxel, from the content around that voxel alone.

    One convolution and three residual blocks of convolutions with dilations 1, 2 and 4 and batch normalization, no
    downsampling: a receptive radius of 22 voxels. Layers and widths are those of the CARL paper.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of an image.
        feature_channels: length of a feature; 64 proved too little in the authors' work.

    Example:
        >>> image = torch.rand(1, 1, 6, 5)
        >>> Encoder(2, 1, 8)(image, torch.ones_like(image)).shape
        torch.Size([1, 8, 6, 5])
    """

    def __init__(self, spatial_dims: int, in_channels: int, feature_channels: int) -> None:
        super().__init__()
        self.first = _TrackedConvolution(spatial_dims, in_channels, feature_channels)
        self.block1 = _ResidualBlock(spatial_dims, feature_channels)
        self.block2 = _ResidualBlock(spatial_dims, feature_channels)
        self.block3 = _ResidualBlock(spatial_dims, feature_channels)
        channels_together(self, spatial_dims)

    def forward(self, image: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Encode a batch of images.

        Args:
            image: `(B, C, *shape)`, background 0.
            active: `(B, 1, *shape)`, 1 where features may differ from the background's and 0 elsewhere, in the
                image's type; content outside it is not seen.

        Returns:
            `(B, feature_channels, *shape)`, each feature of length 4 (or a little less).

        Raises:
            ValueError: if the image is of another type than the encoder.
        """
        check_precision(image, self.first.bias)
        background = torch.zeros(image.shape[1], dtype=image.dtype, device=image.device)
        deviation, background = self.first(image * active, background, active)
        deviation, background = self.block1(deviation, background, active)
        deviation, background = self.block2(deviation, background, active)
        deviation, background = self.block3(deviation, background, active)
        return to_length(deviation + _per_channel(background, deviation), 4.0)
