"""Networks made of networks: two registrations in a row, and a registration at a lower resolution.

Both take and are any module called `net(moving, fixed)` that returns a ddf, so they nest. A network that can register
both directions for less than the price of two offers `both(moving, fixed)`; `both` below falls back to two calls.
"""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..fields import compose, resize, warp
from .active import content_box, is_count, keep_if_content, shift_grid

__all__ = ["Downsample", "TwoStep", "both", "both_of_each", "first_step", "train_first_step"]


def both(net: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Register a pair in both directions with any network.

    Args:
        net: called `net(moving, fixed)`; its method `both` is used if it has one.
        moving: `(B, C, *moving shape)`.
        fixed: `(B, C, *fixed shape)`.

    Returns:
        The ddfs of `net(moving, fixed)` on the fixed and of `net(fixed, moving)` on the moving grid.
    """
    own = getattr(net, "both", None)
    if own is not None:
        return own(moving, fixed)
    return net(moving, fixed), net(fixed, moving)


def both_of_each(
    net: nn.Module, movings: List[torch.Tensor], fixed: torch.Tensor
) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Register several moving images with one fixed image, in both directions, with any network.

    Args:
        net: called `net(moving, fixed)`; its method `both_of_each` is used if it has one.
        movings: each `(B, C, *moving shape)`.
        fixed: `(B, C, *fixed shape)`.

    Returns:
        For each moving image what `both` returns.
    """
    own = getattr(net, "both_of_each", None)
    if own is not None and len(movings) > 1:  # of one pair `both` can make one batch
        return own(movings, fixed)
    return [both(net, moving, fixed) for moving in movings]


class TwoStep(nn.Module):
    """Register with one network, warp, register the rest with another, and compose.

    If `first` is equivariant to independent translations of the images and `second` to translations of both together,
    the composition is equivariant to independent ones: `first` hands `second` a moved image in which the moving image's
    translation is gone.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        first: a network called `first(moving, fixed)`.
        second: a network called `second(moved, fixed)`, both images on the fixed grid.

    Example:
        >>> class Half(nn.Module):
        ...     def forward(self, moving, fixed):
        ...         return torch.full((1, 2, 4, 4), 0.5)
        >>> TwoStep(Half(), Half())(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)).unique().tolist()
        [1.0]
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images.

        Args:
            moving: `(B, C, *moving shape)`, background 0.
            fixed: `(B, C, *fixed shape)`, background 0.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels.
        """
        ddf = self.first(moving, fixed)
        moved = warp(moving, ddf, mode="linear", padding="zeros")
        return compose(ddf, self.second(moved, fixed))

    @torch.jit.unused
    def both(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Register in both directions; arguments and results as for the function `both`."""
        ddf, ddf_back = both(self.first, moving, fixed)
        moved = warp(moving, ddf, mode="linear", padding="zeros")
        moved_back = warp(fixed, ddf_back, mode="linear", padding="zeros")
        return compose(ddf, self.second(moved, fixed)), compose(ddf_back, self.second(moved_back, moving))


class Downsample(nn.Module):
    """Average-pool both images, register them, and lift the ddf.

    Images are padded with background at their end to a multiple of the factor; coarse voxel `c` is the mean of the fine
    voxels from `factor * c + phase` on, so its center sits at fine index `factor * c + (factor - 1) / 2 + phase`, and
    a coarse displacement `u` is the fine one `factor * u + phase of moving - phase of fixed`.

    The phases are 0, which makes the result equivariant to translations by multiples of the factor. With
    `content_phase` each image's blocks are counted from the first voxel of its content instead: then every whole-voxel
    translation of either image leaves its pooled content unchanged, and the result is equivariant to all of them. It
    suits a network that answers for each image's position apart (attention), not one that expects both images on one
    grid (a U-Net), and needs content that is found in the input and not in a warped image.

    `centered` makes the blocks symmetric in the content as well, so that they turn with it: as many as cover its box
    are laid evenly over it. Where their borders then run through voxels, those count half in either block. The coarse
    grid gets a voxel more on each side, so that nothing has to be continued when its ddf is lifted. It is for a network
    that follows turns of the images, see `CoordinateAttention`.

    Args:
        net: a network called `net(moving, fixed)`.
        factor: pooling factor along every axis.
        content_phase: whether blocks are counted from the content.
        centered: whether they are laid symmetrically over it; needs `content_phase`.

    Raises:
        ValueError: if the factor is not an integer of at least 1, or `centered` is asked for without `content_phase`.

    Example:
        >>> class Half(nn.Module):
        ...     def forward(self, moving, fixed):
        ...         return torch.full((1, 2, *fixed.shape[2:]), 0.5)
        >>> ddf = Downsample(Half(), 4)(torch.rand(1, 1, 9, 6), torch.rand(1, 1, 9, 6))
        >>> ddf.shape, ddf.unique().tolist()
        (torch.Size([1, 2, 9, 6]), [2.0])
    """

    def __init__(self, net: nn.Module, factor: int, content_phase: bool = False, *, centered: bool = False) -> None:
        super().__init__()
        if not is_count(factor, 1):
            raise ValueError(f"factor must be an integer of at least 1, got {factor!r}.")
        if centered and not content_phase:
            raise ValueError("centered needs content_phase: blocks can be laid over content only where it is known.")
        self.net = net
        self.factor = factor
        self.content_phase = content_phase
        self.centered = centered

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images.

        Args:
            moving: `(B, C, *moving shape)`, background 0.
            fixed: `(B, C, *fixed shape)`, background 0.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels; zero for a sample of which either image is empty.
        """
        moving_phase, fixed_phase = self._phase(moving), self._phase(fixed)
        ddf = self.net(self._pool(moving, moving_phase), self._pool(fixed, fixed_phase))
        return keep_if_content(self._lift(ddf, moving_phase, fixed_phase, list(fixed.shape[2:])), moving, fixed)

    @torch.jit.unused
    def both(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Register in both directions; arguments and results as for the function `both`."""
        moving_phase, fixed_phase = self._phase(moving), self._phase(fixed)
        ddf, ddf_back = both(self.net, self._pool(moving, moving_phase), self._pool(fixed, fixed_phase))
        return (
            keep_if_content(self._lift(ddf, moving_phase, fixed_phase, list(fixed.shape[2:])), moving, fixed),
            keep_if_content(self._lift(ddf_back, fixed_phase, moving_phase, list(moving.shape[2:])), moving, fixed),
        )

    def coarse(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Pool an image as the network gets it, and say where its voxels lie.

        Args:
            image: `(B, C, *shape)`, background 0.

        Returns:
            The pooled image and the map from its indices to those of the image, `(B, D + 1, D + 1)`, float64.
        """
        phase, dims = self._phase(image), image.dim() - 2
        first = 0.5 * (phase + self.factor - 1).double() - (self.factor if self.centered else 0)
        to_fine = torch.eye(dims + 1, dtype=torch.float64, device=image.device).repeat(image.shape[0], 1, 1)
        to_fine[:, :dims] = torch.cat([self.factor * to_fine[:, :dims, :dims], first.unsqueeze(2)], dim=2)
        return self._pool(image, phase), to_fine

    def _phase(self, image: torch.Tensor) -> torch.Tensor:
        """Return where a coarse voxel begins on the fine grid, `(B, D)`, in half fine voxels, to count blocks from.

        It lies from 0 to factor - 1 voxels, or within half a block of 0 if blocks are centered.
        """
        if not self.content_phase:
            return torch.zeros([image.shape[0], image.dim() - 2], dtype=torch.long, device=image.device)
        first, last = content_box(image)
        if not self.centered:
            return 2 * (first % self.factor)
        excess = (first - last - 1) % self.factor  # of the blocks that cover the box over the box, voxels
        return self.factor - (self.factor - 2 * first + excess) % (2 * self.factor)

    def _pool(self, image: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """Average blocks of voxels counted from the phase: what lies before it is background."""
        ring = self.factor if self.centered else 0
        shape = [(size + self.factor - 1) // self.factor * self.factor + 2 * ring for size in image.shape[2:]]
        image = self._shift(image, phase - 2 * ring, shape, "zeros")
        if image.dim() == 4:
            return F.avg_pool2d(image, self.factor)
        return F.avg_pool3d(image, self.factor)

    def _lift(
        self, ddf: torch.Tensor, moving_phase: torch.Tensor, fixed_phase: torch.Tensor, shape: List[int]
    ) -> torch.Tensor:
        """Place a coarse ddf on the fine grid and count displacements in fine voxels between unshifted grids."""
        ring = self.factor if self.centered else 0
        fine = self._shift(resize(ddf, self.factor), 2 * ring - fixed_phase, shape, "border")
        offset = 0.5 * (moving_phase - fixed_phase).to(fine.dtype)
        return fine + offset.reshape(list(offset.shape) + [1] * len(shape))

    def _shift(self, values: torch.Tensor, offset: torch.Tensor, shape: List[int], padding: str) -> torch.Tensor:
        """Shift a grid by half voxels, `(B, D)`; between two voxels lies their mean."""
        whole = torch.div(offset, 2, rounding_mode="floor")
        if not self.centered:  # no halves
            return shift_grid(values, whole, shape, padding)
        values = shift_grid(values, whole, [size + 1 for size in shape], padding)
        for k, size in enumerate(shape):
            half = 0.5 * (offset[:, k] % 2).to(values.dtype).reshape([-1] + [1] * (values.dim() - 1))
            here, ahead = values.narrow(2 + k, 0, size), values.narrow(2 + k, 1, size)
            values = (1.0 - half) * here + half * ahead
        return values


def first_step(net: nn.Module) -> nn.Module:
    """Return what a nest of combinators does before any refinement, for the whole resolution: its attention stage.

    The result shares its parameters with `net`.

    Args:
        net: `CARL`, or a network that may be made of `TwoStep` and `Downsample`.

    Returns:
        The innermost first network, wrapped in the `Downsample`s it lies in.

    Example:
        >>> net = TwoStep(Downsample(TwoStep(nn.Identity(), nn.Identity()), 2), nn.Identity())
        >>> first_step(net)
        Downsample(
          (net): Identity()
        )
    """
    if hasattr(net, "attention_stage"):
        stage: nn.Module = net.attention_stage()  # type: ignore[operator]
        return stage
    if isinstance(net, TwoStep):
        return first_step(net.first)
    if isinstance(net, Downsample):
        stage = Downsample(first_step(net.net), net.factor, net.content_phase, centered=net.centered)
        stage.training = net.training  # of the wrapper alone: its parts have their own
        return stage
    return net


def train_first_step(net: nn.Module, trained: bool) -> None:
    """Let the attention stage of a network be trained, or keep its weights and train the others.

    Args:
        net: a network.
        trained: whether its first step is trained.

    Raises:
        ValueError: if nothing is left to train.

    Example:
        >>> from equireg.networks import CARL
        >>> net = CARL(2, feature_channels=4, refinement_channels=(4,))
        >>> train_first_step(net, False)
        >>> sorted({weight.requires_grad for weight in net.attention_stage().parameters()})
        [False]
    """
    first_step(net).requires_grad_(trained)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("all weights of the network are its attention stage's: without them nothing is left to train.")
