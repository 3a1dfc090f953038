"""The assembled network: coordinate attention at low resolution, refined by displacement U-Nets and optical flow."""

import json
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import nn

from ..fields import warp
from .active import check_pair, content_box, is_count, keep_if_content, place_affinely
from .affine import AffineFit
from .attention import CoordinateAttention
from .combinators import Downsample, TwoStep, both, first_step
from .flow import LucasKanade
from .refinement import DisplacementUNet
from .rotation import rotation_group as turns_of

__all__ = ["CARL", "NESTINGS"]

NESTINGS = ("deck", "right", "left", "attention")


class CARL(nn.Module):
    """Deformable registration that is equivariant to independent translations of the two images, by construction.

    With Xi for `CoordinateAttention`, Psi1 and Psi2 for `DisplacementUNet`, f for `factor` and Down_k for `Downsample`
    by k, the nestings are

    - "deck": `TwoStep{TwoStep{Down_f{Xi}, Psi1}, Psi2}`, both U-Nets at full resolution;
    - "right": `TwoStep{Down_f{Xi}, TwoStep{Down_2{Psi1}, Psi2}}`, the published network's;
    - "left": `TwoStep{Down_2{TwoStep{Down_(f/2){Xi}, Psi1}}, Psi2}`;
    - "attention": `Down_f{Xi}` alone.

    `nesting="right", factor=4, refinement_channels=(16, 32, 64, 256, 512)` has the layers of the published network.

    The state dict describes the network: an extra entry holds the constructor's arguments, from which
    `equireg.load_network` rebuilds it.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of an image.
        feature_channels: length of an attention feature.
        factor: how much coarser than the images the attention works.
        nesting: "deck", "right", "left" or "attention".
        refinement_channels: widths of every U-Net.
        extra_refinements: further U-Nets at full resolution, after the others.
        padding: by how many voxels, at the attention's resolution, the content's box is grown to the active set.
        rotation_group: turns of either image that the attention stage follows exactly, as for `CoordinateAttention`:
            "none", "pi" or "grid". The fixed content must be thicker than `factor` voxels along every axis. The U-Nets
            do not follow.
        affine_rounds: if positive, the attention's answer gives way to the affine map that fits it best, found in so
            many rounds, see `AffineFit`, but for training. Where no map fits it answers a translation, which turns with
            nothing.
        affine_turns: turns of the moving image from which the first of these rounds starts in eval mode, where that of
            the image as it is explains too little: "none", "pi" or "grid", for which attention is asked 24 times more
            in 3D. Between two images that both get this search the affine map follows such turns exactly.
        flow_rounds: rounds of optical flow after all that, see `LucasKanade`, for images halved once less by each
            entry: `(4, 4, 6)` is 4 at a quarter of the resolution, 4 at half and 6 at the full one. In training there
            is none: it has no weights, and what comes before it is to come as near as it can. Like the U-Nets', its
            lower resolutions follow the fixed image by multiples of their factor.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> net = CARL(spatial_dims=2, feature_channels=8, refinement_channels=(4, 8)).eval()
        >>> net(torch.rand(1, 1, 17, 12), torch.rand(1, 1, 15, 20)).shape
        torch.Size([1, 2, 15, 20])
    """

    __constants__ = ["margin"]
    __jit_unused_properties__ = ["arguments"]
    margin = 8  # voxels around the grid to which a ddf is continued for the flow

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        feature_channels: int = 128,
        *,
        factor: int = 4,
        nesting: str = "deck",
        refinement_channels: Sequence[int] = (16, 32, 64, 256, 512),
        extra_refinements: int = 0,
        padding: int = 2,
        rotation_group: str = "none",
        affine_rounds: int = 0,
        affine_turns: str = "none",
        flow_rounds: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if nesting not in NESTINGS:
            raise ValueError(f"nesting must be one of {', '.join(NESTINGS)}, got '{nesting}'.")
        if not is_count(factor, 1) or (nesting == "left" and factor % 2):
            raise ValueError(f"factor must be at least 1, and even for nesting 'left', got {factor}.")
        if not is_count(extra_refinements, 0) or (extra_refinements > 0 and nesting == "attention"):
            raise ValueError(
                f"extra_refinements must be at least 0, and 0 for nesting 'attention', got {extra_refinements}."
            )
        if not is_count(affine_rounds, 0) or (affine_rounds > 0 and nesting == "left"):
            raise ValueError(f"affine_rounds must be at least 0, and 0 for nesting 'left', got {affine_rounds!r}.")
        if affine_turns != "none" and affine_rounds == 0:
            raise ValueError(f"affine_turns '{affine_turns}' needs affine_rounds of at least 1, got 0.")
        if not isinstance(flow_rounds, (list, tuple)) or not all(is_count(rounds, 1) for rounds in flow_rounds):
            raise ValueError(f"flow_rounds must be integers of at least 1, got {flow_rounds!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels

        def refinement() -> nn.Module:
            return DisplacementUNet(spatial_dims, in_channels, refinement_channels)

        def pooled(net: nn.Module, by: int) -> nn.Module:
            return Downsample(net, by, content_phase=True, centered=rotation_group != "none")

        attention = CoordinateAttention(
            spatial_dims, in_channels, feature_channels, padding=padding, rotation_group=rotation_group
        )
        first = pooled(attention, factor) if nesting != "left" else attention
        if affine_rounds > 0:
            first = AffineFit(first, affine_rounds, turns_of(spatial_dims, affine_turns))
        if nesting == "attention":
            steps: nn.Module = first
        elif nesting == "deck":
            steps = TwoStep(TwoStep(first, refinement()), refinement())
        elif nesting == "right":
            steps = TwoStep(first, TwoStep(Downsample(refinement(), 2), refinement()))
        else:
            steps = TwoStep(pooled(TwoStep(pooled(attention, factor // 2), refinement()), 2), refinement())
        for _ in range(extra_refinements):
            steps = TwoStep(steps, refinement())
        self.steps = steps
        flow: Optional[nn.Module] = None
        for level, rounds in enumerate(flow_rounds):
            halved = 2 ** (len(flow_rounds) - 1 - level)
            step: nn.Module = LucasKanade(spatial_dims, in_channels, rounds)
            step = Downsample(step, halved) if halved > 1 else step
            flow = step if flow is None else TwoStep(flow, step)
        self.flow = flow
        self._arguments: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "in_channels": in_channels,
            "feature_channels": feature_channels,
            "factor": factor,
            "nesting": nesting,
            "refinement_channels": list(refinement_channels),
            "extra_refinements": extra_refinements,
            "padding": padding,
        }
        # Left out where they are not used, as in the files of networks that were made before there was a choice.
        if rotation_group != "none":
            self._arguments["rotation_group"] = rotation_group
        if affine_rounds > 0:
            self._arguments["affine_rounds"] = affine_rounds
        if affine_turns != "none":
            self._arguments["affine_turns"] = affine_turns
        if flow_rounds:
            self._arguments["flow_rounds"] = list(flow_rounds)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images.

        Args:
            moving: `(B, C, *moving shape)`, background 0, spacing and direction as the fixed image's.
            fixed: `(B, C, *fixed shape)`, background 0; the shapes may differ.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels; zero for a sample of which either image is empty.

        Raises:
            ValueError: if the images do not fit the network or each other.
        """
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        return self._finished(self.steps(moving, fixed), moving, fixed)

    def _finished(self, ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the ddf of the learned steps refined by optical flow."""
        if self.flow is None or self.training:
            return ddf
        else:  # TorchScript compiles this branch only where there is a flow
            flow = self.flow(warp(moving, ddf, mode="linear", padding="zeros"), fixed)
            # Flow looks beyond the border of the grid. A turn that ended there would fold.
            start = torch.full_like(content_box(fixed)[0], self.margin)
            wide = place_affinely(ddf, start, [size + 2 * self.margin for size in ddf.shape[2:]])
            return keep_if_content(flow + warp(wide, flow + self.margin), moving, fixed)

    @torch.jit.unused
    def both(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Register in both directions, encoding each image once, but for the affine rounds of eval mode.

        Args:
            moving: `(B, C, *moving shape)`.
            fixed: `(B, C, *fixed shape)`.

        Returns:
            The ddfs of `self(moving, fixed)` and of `self(fixed, moving)`.
        """
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        there, back = both(self.steps, moving, fixed)
        return self._finished(there, moving, fixed), self._finished(back, fixed, moving)

    @torch.jit.unused
    def attention_stage(self) -> nn.Module:
        """Return the network before any refinement, sharing its parameters: called `stage(moving, fixed)`."""
        return first_step(self.steps)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, by name: `CARL(**net.arguments)` builds the same layers."""
        return dict(self._arguments)

    def get_extra_state(self) -> torch.Tensor:
        """Return the constructor's arguments as the bytes of a JSON text, a tensor so that any loader takes it."""
        return torch.tensor(list(json.dumps(self._arguments).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse the state dict of another network, also where the shapes of all parameters agree.

        Optical flow has no weights, so that a network may end with more or less of it than the one that was trained.

        Args:
            state: `(N,)`, bytes, what `get_extra_state` returned.

        Raises:
            ValueError: naming the arguments that differ.
        """
        unused = {"rotation_group": "none", "affine_rounds": 0, "affine_turns": "none"}
        theirs, mine = (
            {name: value for name, value in each.items() if name != "flow_rounds" and value != unused.get(name)}
            for each in (arguments_from_state(state), self._arguments)
        )
        differing = [
            f"{name} {theirs.get(name)} instead of {mine.get(name)}"
            for name in sorted(set(theirs) | set(mine))
            if theirs.get(name) != mine.get(name)
        ]
        if differing:
            raise ValueError(f"the weights belong to another network: {', '.join(differing)}.")


def arguments_from_state(state: torch.Tensor) -> dict[str, Any]:
    """Read the constructor's arguments from the extra entry of a state dict.

    Args:
        state: `(N,)`, bytes, what `CARL.get_extra_state` returned.

    Returns:
        Keyword arguments of `CARL`.

    Raises:
        ValueError: if the entry is something else.
    """
    try:
        arguments = json.loads(bytes(state.tolist()).decode())
    except (TypeError, ValueError) as error:
        raise ValueError(f"the entry that describes the network is not readable: {error}.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"the entry that describes the network must hold its arguments, got {arguments!r}.")
    return arguments
