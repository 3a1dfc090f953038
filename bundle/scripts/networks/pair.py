"""The adapter for hosts that hand a network one tensor and take one back."""

from contextlib import nullcontext
from typing import Optional, Tuple

import torch
from torch import nn

from ..fields import warp
from .active import is_count
from .combinators import both

__all__ = ["PairNetwork"]


class PairNetwork(nn.Module):
    """Present a registration network as one that maps a stacked pair to a ddf and the moved image.

    MONAI's verifiers, exporters, trainers and MONAI Label call a network with one tensor and expect one tensor.

    In eval mode, and in scripted or traced form, the answer is the ddf followed by the moved image. In training mode it
    goes on with the other direction: the ddf from moving to fixed points and the fixed image on the moving grid, which
    share one grid here.

    Args:
        net: a network called `net(moving, fixed)`.
        two_way: whether training mode answers in both directions.
        carried_channels: how many of each image's last channels, in training mode, are labels: the network does not see
            them, and they are moved as its images are, for a loss that compares them.
        autocast: "bfloat16" runs the convolutions in that type (`torch.autocast`), in eager mode; where the processor
            has instructions for it, training is faster. Attention, coordinates and sampling stay float32; what a U-Net
            adds to them is rounded to 8 bits. An empty text leaves everything in the type of the images.

    Raises:
        ValueError: for another `autocast`, or fewer carried channels than none.

    Example:
        >>> from equireg.networks import DisplacementUNet
        >>> net = PairNetwork(DisplacementUNet(2, 1, channels=(4, 8)))
        >>> pair = torch.rand(2, 2, 8, 8)
        >>> net.train()(pair).shape, net.eval()(pair).shape
        (torch.Size([2, 6, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, net: nn.Module, two_way: bool = True, autocast: str = "", carried_channels: int = 0) -> None:
        super().__init__()
        if autocast not in ("", "bfloat16"):  # float16 would need a scaled loss
            raise ValueError(f"autocast must be 'bfloat16' or empty, got {autocast!r}.")
        if not is_count(carried_channels, 0):
            raise ValueError(f"carried_channels must be at least 0, got {carried_channels}.")
        self.net = net
        self.two_way = two_way
        self.autocast = autocast
        self.carried_channels = carried_channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Register a stacked pair.

        Args:
            image: `(B, 2C, *shape)`, the moving image's channels first, then the fixed image's; background 0.

        Returns:
            `(B, D + C, *shape)`: the ddf in voxels, then the moved image; in training mode with `two_way`,
            `(B, 2 (D + C), *shape)`: the same again for the other direction.

        Raises:
            ValueError: if the number of channels is odd, or the images do not fit the network.
        """
        if image.dim() < 3 or image.shape[1] < 2 or image.shape[1] % 2 != 0:
            raise ValueError(
                f"expected a stacked pair (B, 2C, *spatial) with moving and fixed channels, got {list(image.shape)}."
            )
        channels = image.shape[1] // 2
        moving, fixed = image[:, :channels], image[:, channels:]
        if torch.jit.is_scripting():
            ddf = self.net(moving, fixed)
        else:
            seen = channels - self.carried_channels if self.training else channels
            ddf, ddf_back = self._register(moving[:, :seen], fixed[:, :seen])
            if ddf_back is not None:
                back = warp(fixed, ddf_back, mode="linear", padding="zeros")
                return torch.cat([ddf, warp(moving, ddf, mode="linear", padding="zeros"), ddf_back, back], dim=1)
        return torch.cat([ddf, warp(moving, ddf, mode="linear", padding="zeros")], dim=1)

    @torch.jit.unused
    def _register(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Return the ddf, and the one of the other direction or None."""
        device = moving.device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            if self.training and self.two_way:
                return both(self.net, moving, fixed)
            return self.net(moving, fixed), None
