"""Run a pair network on content alone, wherever on the canvas it lies."""

from __future__ import annotations

from typing import Any, Callable

import torch
from monai.inferers import Inferer
from torch import nn

from .fields import full_precision, warp
from .mind import check_weight
from .networks.active import content_box, place_affinely, shift_grid
from .networks.pair import PairNetwork

__all__ = ["RegistrationInferer"]


class _TwoImages(nn.Module):
    """Present a network of stacked pairs as one called `net(moving, fixed)`, with images of different shapes.

    Args:
        network: maps `(1, 2C, *shape)` to the ddf and further channels.
        args: passed on to the network.
        kwargs: passed on to the network.
    """

    def __init__(self, network: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.args = args
        self.kwargs = kwargs

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Pad both images at their end to one shape; return the ddf `(1, D, *fixed shape)`."""
        shape = [max(sizes) for sizes in zip(moving.shape[2:], fixed.shape[2:])]
        here = torch.zeros(1, len(shape), dtype=torch.long, device=fixed.device)
        pair = torch.cat([shift_grid(image, here, shape, "zeros") for image in (moving, fixed)], dim=1)
        ddf = self.network(pair, *self.args, **self.kwargs)[:, : len(shape)]
        return shift_grid(ddf, here, list(fixed.shape[2:]), "border")


class RegistrationInferer(Inferer):
    """Crop each image to its content, register the crops, and put the answer back on the fixed canvas.

    A network sees the same tensors wherever the contents lie on their canvases, so the answer follows every whole-voxel
    move of either image exactly, refinement included, and empty space costs nothing. Beyond the crop displacements go
    on along the affine map that fits those in it best. Samples of a batch run one by one.

    Args:
        margin: voxels of background kept around each content.
        optimization: improves the network's answer for each pair of crops, called
            `optimization(net, moving, fixed, ddf, weight)` like `equireg.optimization.FieldOptimization`, where `net`
            is called `net(moving, fixed)`; None leaves the answer as it is.

    Raises:
        ValueError: if `margin` is negative.

    Example:
        >>> from equireg.networks import CARL, PairNetwork
        >>> network = PairNetwork(CARL(2, feature_channels=8, refinement_channels=(4, 8))).eval()
        >>> RegistrationInferer()(torch.rand(1, 2, 20, 24), network).shape
        torch.Size([1, 3, 20, 24])
    """

    def __init__(self, margin: int = 4, optimization: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f"margin must be at least 0, got {margin}.")
        self.margin = margin
        self.optimization = optimization

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        *args: Any,
        fixed: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Register a batch of pairs.

        Args:
            inputs: the stacked pair `(B, 2C, *shape)`, moving channels first; or, with `fixed`, the moving image
                `(B, C, *moving shape)`. Background 0.
            network: a network that maps a stacked pair to the ddf and further channels, such as `PairNetwork` in eval
                mode or its exported form.
            fixed: the fixed image `(B, C, *fixed shape)`, if it is not part of `inputs`.
            weight: `(B, 1, *fixed shape)`, not negative: how much the optimization lets each fixed voxel's similarity
                count. The network never sees it, so without optimization it has no effect.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            `(B, D + C, *fixed shape)`: the ddf in voxels, then the moved image.

        Raises:
            ValueError: if the images do not make a pair, or if one is empty, has a single value everywhere, or holds
                values that are not finite; or for a weight that is no such map or 0 everywhere around a content.
        """
        if fixed is None:
            if inputs.dim() < 3 or inputs.shape[1] % 2:
                raise ValueError(
                    f"expected a stacked pair (B, 2C, *spatial) of moving and fixed, got {list(inputs.shape)}."
                )
            moving, fixed = inputs.chunk(2, dim=1)
        else:
            moving = inputs
            if moving.dim() != fixed.dim() or moving.shape[:2] != fixed.shape[:2]:
                raise ValueError(
                    f"moving and fixed must have one batch size and one number of channels and axes, got "
                    f"{list(moving.shape)} and {list(fixed.shape)}."
                )
        for name, image in (("moving", moving), ("fixed", fixed)):
            if not torch.isfinite(image).all():
                raise ValueError(f"the {name} image holds values that are not finite (NaN or infinite).")
            if not (image != 0).flatten(1).any(dim=1).all():
                raise ValueError(f"the {name} image is empty: every voxel of a sample is background (0).")
            values = image.flatten(2)
            if (values.amin(dim=2) == values.amax(dim=2)).all(dim=1).any():
                raise ValueError(f"the {name} image is constant: every voxel of a sample has the same value.")
        check_weight(weight, fixed, "RegistrationInferer")
        weights = [None] * len(fixed) if weight is None else weight.split(1)
        samples = zip(moving.split(1), fixed.split(1), weights)
        ddf = torch.cat([self._register(m, f, w, network, *args, **kwargs) for m, f, w in samples])
        return torch.cat([ddf, warp(moving, ddf, mode="linear", padding="zeros")], dim=1)

    def _register(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        weight: torch.Tensor | None,
        network: Callable[..., torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the ddf `(1, D, *fixed shape)` of one pair."""
        (moving_start, moving_size), (fixed_start, fixed_size) = self._box(moving), self._box(fixed)
        shape = torch.maximum(moving_size, fixed_size).tolist()
        pair = [shift_grid(moving, moving_start, shape, "zeros"), shift_grid(fixed, fixed_start, shape, "zeros")]
        dims = fixed.dim() - 2
        ddf = network(torch.cat(pair, dim=1), *args, **kwargs)[:, :dims]
        for k, size in enumerate(fixed_size.tolist()):
            ddf = ddf.narrow(2 + k, 0, size)
        if self.optimization is not None:
            moving = shift_grid(moving, moving_start, moving_size.tolist(), "zeros")
            fixed_crop = shift_grid(fixed, fixed_start, fixed_size.tolist(), "zeros")
            if weight is not None:
                weight = shift_grid(weight, fixed_start, fixed_size.tolist(), "zeros")
            # What a pair network is made of takes crops of different shapes as they are.
            net = network.net if isinstance(network, PairNetwork) else _TwoImages(network, args, kwargs)
            ddf = self.optimization(net, moving, fixed_crop, ddf, weight).to(ddf.dtype)
        # Beyond the crop along the affine map that fits it best: a turn goes on as a turn.
        whole = place_affinely(full_precision(ddf), fixed_start, list(fixed.shape[2:]))
        return whole + (moving_start - fixed_start).to(whole.dtype).reshape([1, dims] + [1] * dims)

    def _box(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the crop of an image begins, `(1, D)`, and its size, `(D,)`; it may reach over the canvas."""
        first, last = content_box(image)
        return first - self.margin, (last - first + 1 + 2 * self.margin)[0]
