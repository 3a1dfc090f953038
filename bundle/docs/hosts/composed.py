"""Put MONAI's `VoxelMorph` and `RegUNet` behind the package's attention: together they follow every move.

    python bundle/docs/hosts/composed.py

Alone, neither knows where the moving image went. Behind `CoordinateAttention` they see it where the fixed image is.
"""

from __future__ import annotations

import fire
import torch
import torch.nn.functional as F
from monai.networks.nets import RegUNet, VoxelMorph, VoxelMorphUNet
from monai.utils import set_determinism
from torch import nn
from tutorial_loop import pairs, train

from equireg.equivariance import Cropped, equivariance_error
from equireg.networks import CoordinateAttention, Downsample, TwoStep


class FromVoxelMorph(nn.Module):
    """Call MONAI's `VoxelMorph`, which returns the moved image and the ddf, for the ddf alone."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        unet = VoxelMorphUNet(spatial_dims, 2, spatial_dims, channels=(8, 16, 16, 16), final_conv_channels=(8,))
        self.net = VoxelMorph(unet, spatial_dims=spatial_dims)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Take images `(B, 1, *shape)` of one shape; return the ddf `(B, D, *shape)`, voxels."""
        return self.net(moving, fixed)[1]


class FromRegUNet(nn.Module):
    """Call MONAI's `RegUNet`, which takes one stacked tensor, with two images."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        # A last layer of zeros: it starts from what came before, and not from noise.
        self.net = RegUNet(spatial_dims, 2, 8, depth=2, out_kernel_initializer="zeros", out_channels=spatial_dims)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Take images `(B, 1, *shape)` of one shape; return the ddf `(B, D, *shape)`, voxels."""
        return self.net(torch.cat([moving, fixed], dim=1))


class AnySize(nn.Module):
    """Pad both images with background to sizes that a network's strides divide, and crop its ddf.

    Args:
        net: a network called `net(moving, fixed)`.
        divisor: of the sizes it takes.
    """

    def __init__(self, net: nn.Module, divisor: int = 4) -> None:
        super().__init__()
        self.net, self.divisor = net, divisor

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Take images `(B, 1, *shape)` of one shape; return the ddf `(B, D, *shape)`, voxels."""
        padding = [n for size in reversed(fixed.shape[2:]) for n in (0, -size % self.divisor)]
        ddf = self.net(F.pad(moving, padding), F.pad(fixed, padding))
        return ddf[(..., *(slice(size) for size in fixed.shape[2:]))]


def composed(spatial_dims: int) -> nn.Module:
    """Return attention at a quarter of the resolution, then `VoxelMorph` at half and `RegUNet` at all of it."""
    attention = Downsample(CoordinateAttention(spatial_dims, feature_channels=16), 4, content_phase=True)
    voxelmorph, regunet = (AnySize(net(spatial_dims)) for net in (FromVoxelMorph, FromRegUNet))
    return TwoStep(TwoStep(attention, Downsample(voxelmorph, 2)), regunet)


def main(spatial_dims: int = 2, epochs: int = 8) -> dict[str, dict[str, float]]:
    """Train each network in the tutorials' loop and measure how far it is from following translations.

    Args:
        spatial_dims: 2 or 3.
        epochs: passes over the data.

    Returns:
        For each network the loss of the `first` and of the `last` epoch, and its largest deviation in voxels: `error`
        when the moving image moves, `cropped` when both move, on their own, and `RegistrationInferer` crops them.
    """
    set_determinism(seed=0)
    networks = {
        "VoxelMorph": AnySize(FromVoxelMorph(spatial_dims)),
        "RegUNet": AnySize(FromRegUNet(spatial_dims)),
        "attention, then both": composed(spatial_dims),
    }
    loader = pairs(spatial_dims)
    pair = next(iter(loader))
    images = pair["moving"][:1], pair["fixed"][:1]
    found = {}
    for name, network in networks.items():
        print(name)
        history = train(network, loader, spatial_dims, epochs)
        alone = equivariance_error(network, *images, kinds=["translation"], sides=["moving"])
        cropped = equivariance_error(Cropped(network), *images, kinds=["translation"], sides=["independent"])
        found[name] = {
            "first": history[0],
            "last": history[-1],
            "error": alone["translation of moving"],
            "cropped": cropped["translation of independent"],
        }
        print({key: float(f"{value:.3g}") for key, value in found[name].items()})
    return found


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
