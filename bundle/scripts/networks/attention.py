"""Coordinate attention: register by looking up, for each fixed voxel, where its feature lies in the moving image."""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..fields import full_precision, identity_grid
from .active import (
    box_mask,
    check_pair,
    clamp_to_box,
    content_box,
    continue_affinely,
    crop_to_content,
    has_content,
    is_count,
    keep_if_content,
    pad_all,
    shift_grid,
)
from .encoder import Encoder, to_length
from .rotation import rotation_group as turns_of
from .rotation import turn, turn_back
from .streaming import streamed_attention

__all__ = ["CoordinateAttention", "attend"]


# The crop to the content, where it begins `(B, D)`, its features and the allowed keys, see `_encode`.
_Seen = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Average values by softmax weights of the unscaled products of queries and keys, in memory linear in both.

    On a GPU and in scripted, traced and compiled graphs this is torch's fused kernel, in eager mode on a CPU
    `streamed_attention`. Half precision is computed as float32, and automatic mixed precision left: a coordinate
    rounded to bfloat16 is off by up to a quarter voxel at 64 voxels from the center.

    Args:
        queries: `(B, Q, F)`.
        keys: `(B, K, F)`; the product of a query's length and a key's is at most 64, which eager mode on a CPU checks.
        values: `(B, K, V)`, V at most F.
        allowed: `(B, K)`, boolean, at least one true in each sample; other keys get no weight.

    Returns:
        `(B, Q, V)`, float32 or better.

    Example:
        >>> one_hot = torch.eye(3).unsqueeze(0)
        >>> allowed = torch.tensor([[True, False, False]])
        >>> attend(one_hot, one_hot, torch.arange(3.0).reshape(1, 3, 1) + 5.0, allowed).flatten().tolist()
        [5.0, 5.0, 5.0]
    """
    queries, keys, values = full_precision(queries), full_precision(keys), full_precision(values)
    if torch.jit.is_scripting():
        return _attend(queries, keys, values, allowed)
    else:  # TorchScript compiles what follows a returning `if`, but not this branch
        if queries.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            return streamed_attention(queries, keys, values, allowed)
        with torch.autocast(queries.device.type, enabled=False):
            return _attend(queries, keys, values, allowed)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Do what `attend` does, in the one precision of the arguments, by torch's kernel."""
    # Contiguous features, values as wide as the keys and a mask of one row keep torch on its fused kernel, which never
    # builds the Q x K matrix; anything else falls back to the quadratic one.
    width = values.shape[2]
    values = F.pad(values, [0, keys.shape[2] - width])
    answer = F.scaled_dot_product_attention(
        queries.unsqueeze(1).contiguous(),
        keys.unsqueeze(1).contiguous(),
        values.unsqueeze(1).contiguous(),
        attn_mask=allowed[:, None, None, :],
        scale=1.0,
    )
    return answer.squeeze(1)[:, :, :width]


class CoordinateAttention(nn.Module):
    """The deck's equivariant network: softmax attention whose values are coordinates.

    Both images go through one encoder; each fixed voxel's feature is compared with all features of the moving image,
    and the answer is the average of their coordinates. When the moving content moves, keys and coordinates move with
    it; when the fixed content moves, queries move. Features depend on the content only (see `Encoder`) and the keys are
    the moving content's bounding box, grown by `padding`, so the answer follows exactly. Outside the bounding box of
    the fixed content the displacement of the nearest voxel inside continues.

    With a `rotation_group`, features are the mean over all turns of the image by the group, turned back, less what they
    have in common on the active set. They follow the image when it turns by a member of the group, and the answer to
    such turns of either image is exact as well, provided that the fixed content spans two voxels along each axis.
    Outside it the answer then goes on along the affine map that fits it best, since a continued displacement does not
    turn. It costs an encoder pass for each turn.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of an image.
        feature_channels: length of a feature.
        padding: by how many voxels the content's box is grown to the active set; the authors use 9.
        rotation_group: "none", "pi" (half turns about the axes: 2 in 2D, 4 in 3D, as the paper's variant for rotations)
            or "grid" (all rotations of the grid: 4 in 2D, 24 in 3D).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> net = CoordinateAttention(spatial_dims=2, in_channels=1, feature_channels=8)
        >>> net(torch.rand(1, 1, 7, 9), torch.rand(1, 1, 6, 5)).shape
        torch.Size([1, 2, 6, 5])
    """

    turns: List[List[List[int]]]

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        feature_channels: int = 128,
        *,
        padding: int = 2,
        rotation_group: str = "none",
    ) -> None:
        super().__init__()
        if not is_count(spatial_dims, 2) or spatial_dims > 3:
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        if not (is_count(in_channels, 1) and is_count(feature_channels, spatial_dims) and is_count(padding, 0)):
            raise ValueError(
                "in_channels must be an integer of at least 1, feature_channels one of at least spatial_dims and "
                f"padding one of at least 0, got {in_channels!r}, {feature_channels!r} and {padding!r}."
            )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.padding = padding
        self.turns = turns_of(spatial_dims, rotation_group)
        self.encoder = Encoder(spatial_dims, in_channels, feature_channels)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images.

        Args:
            moving: `(B, C, *moving shape)`, background 0.
            fixed: `(B, C, *fixed shape)`, background 0; the shapes may differ.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels; zero for a sample of which either image is empty.

        Raises:
            ValueError: if the images do not fit the network or each other.
        """
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        return self._answer(moving, self._look(moving), fixed, self._look(fixed))

    @torch.jit.unused
    def both(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Register a pair in both directions, encoding each image once.

        In training, images of one shape are encoded as one batch, which gives batch normalization both of them.

        Args:
            moving: `(B, C, *moving shape)`.
            fixed: `(B, C, *fixed shape)`.

        Returns:
            The ddfs of `self(moving, fixed)` and of `self(fixed, moving)`.
        """
        if not self.training or moving.shape != fixed.shape:
            return self.both_of_each([moving], fixed)[0]
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        (moving_crop, moving_start), (fixed_crop, fixed_start) = crop_to_content(moving), crop_to_content(fixed)
        shape = [max(sizes) for sizes in zip(moving_crop.shape[2:], fixed_crop.shape[2:])]
        here = torch.zeros_like(moving_start)
        crops = [shift_grid(crop, here, shape, "zeros") for crop in (moving_crop, fixed_crop)]
        features, allowed = (both.chunk(2) for both in self._encode(torch.cat(crops)))
        seen_moving, seen_fixed = zip(crops, (moving_start, fixed_start), features, allowed)
        return self._answer(moving, seen_moving, fixed, seen_fixed), self._answer(
            fixed, seen_fixed, moving, seen_moving
        )

    @torch.jit.unused
    def both_of_each(self, movings: List[torch.Tensor], fixed: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """Register several moving images with one fixed image in both directions, encoding each image once.

        Args:
            movings: each `(B, C, *moving shape)`.
            fixed: `(B, C, *fixed shape)`.

        Returns:
            For each moving image what `both` returns.
        """
        for moving in movings:
            check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        here = self._look(fixed)
        there = [(moving, self._look(moving)) for moving in movings]
        return [
            (self._answer(moving, seen, fixed, here), self._answer(fixed, here, moving, seen)) for moving, seen in there
        ]

    def _look(self, image: torch.Tensor) -> _Seen:
        """Crop an image to its content and encode it."""
        crop, start = crop_to_content(image)
        features, allowed = self._encode(crop)
        return crop, start, features, allowed

    def _answer(self, moving: torch.Tensor, seen: _Seen, fixed: torch.Tensor, here: _Seen) -> torch.Tensor:
        """Return the ddf `(B, D, *fixed shape)` of a pair of which each image was looked at."""
        ddf = self._match(seen[0], seen[2], seen[3], here[0], here[2])
        return self._place(ddf, moving, seen[1], fixed, here[1])

    def _encode(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return features `(B, F, *padded shape)` and the allowed keys `(B, 1, *padded shape)` of the padded image.

        The keys are the active set, but for an empty image: there every key is allowed, as softmax needs one, and
        nothing is active, so that it leaves no trace in the statistics of batch normalization.
        """
        first, last = content_box(image)
        padded = pad_all(image, self.padding)
        # On the padded grid the content's box starts at first + padding; grown by the padding it starts at first.
        allowed = box_mask(first, last + 2 * self.padding, list(padded.shape[2:]))
        active = allowed & has_content(image).reshape([-1] + [1] * (image.dim() - 1))
        return self._features(padded, active.to(image.dtype)), allowed

    def _features(self, padded: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Encode an image, or the mean of what its turns say."""
        features = self.encoder(padded, active)
        if len(self.turns) == 1:
            return features
        for perm, signs in self.turns[1:]:
            turned = self.encoder(turn(padded, perm, signs), turn(active, perm, signs))
            features = features + turn_back(turned, perm, signs)
        # Averaging over turns keeps what all voxels share and loses much of what tells them apart: with the former,
        # trainings from some seeds never left an attention that answers the center of the content.
        axes = [2 + k for k in range(self.spatial_dims)]
        count = active.sum(dim=axes, keepdim=True).clamp(min=1.0)
        features = features - (features * active).sum(dim=axes, keepdim=True) / count
        return to_length(features, 4.0)

    def _match(
        self,
        moving: torch.Tensor,
        moving_features: torch.Tensor,
        allowed: torch.Tensor,
        fixed: torch.Tensor,
        fixed_features: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from the fixed voxels, cropped back, to the moving voxels, padded with the identity continued."""
        queries = fixed_features
        for k in range(self.spatial_dims):
            queries = queries.narrow(2 + k, self.padding, fixed.shape[2 + k])
        first, last = content_box(moving)
        view = [moving.shape[0], self.spatial_dims] + [1] * self.spatial_dims
        # Coordinates relative to the content's center: small numbers, small rounding. Half precision cannot count them.
        dtype = torch.promote_types(moving.dtype, torch.float32)
        center = (0.5 * (first + last)).to(dtype).reshape(view)
        coordinates = identity_grid(list(moving_features.shape[2:]), dtype, moving.device) - self.padding - center
        answer = attend(
            queries.flatten(2).transpose(1, 2),
            moving_features.flatten(2).transpose(1, 2),
            coordinates.flatten(2).transpose(1, 2),
            allowed.flatten(1),
        )
        found = answer.transpose(1, 2).reshape(list(queries.shape[:1]) + [self.spatial_dims] + list(fixed.shape[2:]))
        return found + (center - identity_grid(list(fixed.shape[2:]), dtype, fixed.device))

    def _place(
        self,
        ddf: torch.Tensor,
        moving: torch.Tensor,
        moving_start: torch.Tensor,
        fixed: torch.Tensor,
        fixed_start: torch.Tensor,
    ) -> torch.Tensor:
        """Put a ddf between crops, which start at `(B, D)` on their canvases, on the fixed canvas and continue it."""
        offset = (moving_start - fixed_start).to(ddf.dtype).reshape(list(ddf.shape[:2]) + [1] * self.spatial_dims)
        ddf = shift_grid(ddf, -fixed_start, list(fixed.shape[2:]), "border") + offset
        first, last = content_box(fixed)
        if len(self.turns) == 1:
            ddf = clamp_to_box(ddf, first, last)
        else:
            ddf = continue_affinely(ddf, first, last)
        return keep_if_content(ddf, moving, fixed)
