"""Run a pair network on content alone, wherever on the canvas it lies."""

from __future__ import annotations

from typing import Any, Callable

import torch
from monai.inferers import Inferer

from .fields import warp
from .networks.active import content_box, shift_grid

__all__ = ["RegistrationInferer"]


class RegistrationInferer(Inferer):
    """Crop each image to its content, register the crops, and put the answer back on the fixed canvas.

    A network sees the same tensors wherever the contents lie on their canvases, so the answer follows every whole-voxel
    move of either image exactly, refinement included; and empty space costs nothing. Samples of a batch run one by one.

    Args:
        margin: voxels of background kept around each content.

    Example:
        >>> from equireg.networks import CARL, PairNetwork
        >>> network = PairNetwork(CARL(2, feature_channels=8, refinement_channels=(4, 8))).eval()
        >>> RegistrationInferer()(torch.rand(1, 2, 20, 24), network).shape
        torch.Size([1, 3, 20, 24])
    """

    def __init__(self, margin: int = 4) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f"margin must be at least 0, got {margin}.")
        self.margin = margin

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        *args: Any,
        fixed: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Register a batch of pairs.

        Args:
            inputs: the stacked pair `(B, 2C, *shape)`, moving channels first; or, with `fixed`, the moving image
                `(B, C, *moving shape)`. Background 0.
            network: a network that maps a stacked pair to the ddf and further channels, such as `PairNetwork` in eval
                mode or its exported form.
            fixed: the fixed image `(B, C, *fixed shape)`, if it is not part of `inputs`.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            `(B, D + C, *fixed shape)`: the ddf in voxels, then the moved image.

        Raises:
            ValueError: if the images do not make a pair, or if one is empty, has a single value everywhere, or holds
                values that are not finite.
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
        pairs = zip(moving.split(1), fixed.split(1))
        ddf = torch.cat([self._register(m, f, network, *args, **kwargs) for m, f in pairs])
        return torch.cat([ddf, warp(moving, ddf, mode="linear", padding="zeros")], dim=1)

    def _register(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
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
        whole = shift_grid(ddf, -fixed_start, list(fixed.shape[2:]), "border")
        return whole + (moving_start - fixed_start).to(whole.dtype).reshape([1, dims] + [1] * dims)

    def _box(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the crop of an image begins, `(1, D)`, and its size, `(D,)`; it may reach over the canvas."""
        first, last = content_box(image)
        return first - self.margin, (last - first + 1 + 2 * self.margin)[0]
