"""The refinement network: a U-Net that just predicts the displacement."""

from typing import List, Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Pool
from torch import nn

from .active import check_pair, check_precision, is_count, keep_if_content
from .layout import channels_together
from .statistics import BatchNorm

__all__ = ["DisplacementUNet"]


def _pad_to_even(image: torch.Tensor) -> torch.Tensor:
    """Append a voxel of zeros to each axis of odd length, so that a stride of two covers it in full."""
    pad: List[int] = []
    for k in range(image.dim() - 1, 1, -1):
        pad.extend([0, image.shape[k] % 2])
    return F.pad(image, pad)


def _match_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Keep the first channels, or put channels of zeros in front."""
    if image.shape[1] >= channels:
        return image[:, :channels]
    missing = image.new_zeros([image.shape[0], channels - image.shape[1]] + list(image.shape[2:]))
    return torch.cat([missing, image], dim=1)


class _Down(nn.Module):
    """Halve the resolution: a strided convolution plus the averaged input."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.pool = Pool[Pool.AVG, spatial_dims](2)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _pad_to_even(x)
        return self.conv(F.leaky_relu(x)) + _match_channels(self.pool(x), self.out_channels)


class _Up(nn.Module):
    """Double the resolution: a transposed convolution plus the interpolated input, normalized."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONVTRANS, spatial_dims](in_channels, out_channels, kernel_size=4, stride=2, padding=1)
        self.interpolate = nn.Upsample(scale_factor=2, mode="bilinear" if spatial_dims == 2 else "trilinear")
        self.norm = BatchNorm(out_channels)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        fine = self.conv(F.leaky_relu(x))
        fine += self.interpolate(_match_channels(x, self.out_channels))  # in place: here memory peaks
        fine = self.norm(fine)
        for k in range(2, skip.dim()):
            fine = fine.narrow(k, 0, skip.shape[k])
        return torch.cat([fine, skip], dim=1)


class DisplacementUNet(nn.Module):
    """Predict the displacement from both images at once: translation equivariant only when both images move together.

    The layers of the published refinement network ("tallUNet2"): strided convolutions down, transposed ones up, skips,
    batch normalization on the way up, and a head whose weights start at zero, so that an untrained network answers the
    identity. Axes of any length work: an odd one is padded with background wherever it is halved.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of an image.
        channels: channels after each halving; as many halvings as entries.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> net = DisplacementUNet(spatial_dims=2, in_channels=1, channels=(4, 8))
        >>> net(torch.rand(1, 1, 7, 5), torch.rand(1, 1, 7, 5)).abs().max().item()
        0.0
    """

    def __init__(
        self, spatial_dims: int, in_channels: int = 1, channels: Sequence[int] = (16, 32, 64, 256, 512)
    ) -> None:
        super().__init__()
        if not is_count(spatial_dims, 2) or spatial_dims > 3 or not is_count(in_channels, 1):
            raise ValueError(
                f"spatial_dims must be 2 or 3 and in_channels an integer of at least 1, got {spatial_dims!r} and "
                f"{in_channels!r}."
            )
        if not isinstance(channels, Sequence) or not channels or not all(is_count(width, 1) for width in channels):
            raise ValueError(f"channels must name at least one positive width, got {channels!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        # What one unit of the head's output moves; a tenth of the image in the authors' network, whose shape is fixed.
        self.voxels_per_unit = 10.0
        down = [2 * in_channels, *channels]
        # On the way up the widths double from the first one on, but never exceed those of the way down.
        up = [min(width, channels[0] * 2**level) for level, width in enumerate(channels)]
        self.downs = nn.ModuleList(_Down(spatial_dims, down[i], down[i + 1]) for i in range(len(channels)))
        ups: List[nn.Module] = []
        width = down[-1]
        for level in range(len(channels) - 1, -1, -1):
            ups.append(_Up(spatial_dims, width, up[level]))
            width = up[level] + down[level]
        self.ups = nn.ModuleList(ups)
        self.head = Conv[Conv.CONV, spatial_dims](width, spatial_dims, kernel_size=3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        channels_together(self, spatial_dims)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images on one grid.

        Args:
            moving: `(B, C, *shape)`, background 0; another shape is cropped or padded with background at its end.
            fixed: `(B, C, *shape)`, background 0.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels; zero for a sample of which either image is empty.

        Raises:
            ValueError: if the images do not fit the network or each other.
        """
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        check_precision(moving, self.head.weight)
        x = torch.cat([_match_grid(moving, list(fixed.shape[2:])), fixed], dim=1)
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        skips: List[torch.Tensor] = []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        for up in self.ups:
            x = up(x, skips.pop())
        return keep_if_content(self.head(x) * self.voxels_per_unit, moving, fixed)


def _match_grid(image: torch.Tensor, shape: List[int]) -> torch.Tensor:
    """Crop or pad the end of each axis, so that voxel indices keep their meaning."""
    pad: List[int] = []
    for k in range(len(shape) - 1, -1, -1):
        pad.extend([0, shape[k] - image.shape[2 + k]])
    return F.pad(image, pad)
