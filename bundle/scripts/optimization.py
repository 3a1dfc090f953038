"""Instance optimization: improve a network's answer for one pair of images by minimizing the loss on that very pair.

Both ways are called `optimize(network, moving, fixed, ddf, weight)`, take the network's ddf and return a better one of
the same shape. `FieldOptimization` moves the displacements themselves, in seconds; `NetworkOptimization` trains on a
copy of the network, as the CARL paper does. Neither keeps anything between calls, changes its arguments or returns a
ddf with a larger loss than it was given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from monai.utils import convert_to_tensor
from torch import nn
from torch.nn import functional

from .fields import full_precision, jacobian_determinant, resize, warp
from .losses import DiffusionLoss, GradICONLoss, LocalCorrelationLoss
from .mind import MINDSSCLoss, check_weight
from .networks.active import affine_slopes, continue_along, is_count
from .networks.combinators import both
from .progress import progress as progress_bar
from .windows import gaussian_blur

__all__ = ["FieldOptimization", "NetworkOptimization"]

Similarity = Callable[..., torch.Tensor]  # called (pred, target), or (pred, target, weight) where there is a weight

_LEAST_VOLUME = 0.1  # cells are kept from shrinking below this share of their volume, so that none folds


def _check_options(owner: str, steps: int, **positive_or_zero: float) -> None:
    """Raise a ValueError unless `steps` is a number of steps and the other options are finite and not negative."""
    if not is_count(steps, 0):
        raise ValueError(f"{owner} expects steps to be an integer of at least 0, got {steps!r}.")
    for name, value in positive_or_zero.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner} expects {name} to be finite and at least 0, got {value}.")


def _tensors(
    owner: str, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Check the arguments of a call and return them as plain tensors in float32 or better, ready for gradients."""
    dims = fixed.dim() - 2
    fits = dims in (2, 3) and moving.dim() == fixed.dim() and moving.shape[:2] == fixed.shape[:2] == (1, fixed.shape[1])
    if not fits or ddf.shape != (1, dims, *fixed.shape[2:]):
        raise ValueError(
            f"{owner} expects moving (1, C, *moving shape), fixed (1, C, *fixed shape) and ddf (1, D, *fixed shape) "
            f"with D = 2 or 3 spatial axes, got {list(moving.shape)}, {list(fixed.shape)} and {list(ddf.shape)}."
        )
    check_weight(weight, fixed, owner)

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        plain = full_precision(convert_to_tensor(tensor, track_meta=False)).detach()
        return plain.clone() if plain.is_inference() else plain  # autograd refuses tensors made in inference mode

    return ready(moving), ready(fixed), ready(ddf), None if weight is None else ready(weight)


def _compare(
    similarity: Similarity, pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """Call a similarity with a weight only if there is one: most losses take none."""
    return similarity(pred, target) if weight is None else similarity(pred, target, weight)


def _descend(
    objective: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    parameters: Sequence[torch.Tensor],
    start: torch.Tensor,
    steps: int,
    learning_rate: float,
    progress: bool,
) -> torch.Tensor:
    """Minimize with Adam and return the ddf of the least loss seen, the start included.

    Args:
        objective: returns the loss, a scalar, and its ddf, for the parameters as they are.
        parameters: what Adam changes.
        start: the ddf before any step, voxels.
        steps: number of steps.
        learning_rate: Adam's.
        progress: show a progress bar.

    Returns:
        the shape of `start`, voxels, detached. A loss or gradient that is not finite ends the descent.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    best, least = start, math.inf
    numbers: Iterable[int] = range(steps + 1)
    for number in progress_bar(numbers, "optimizing", "step") if progress else numbers:
        try:
            loss, ddf = objective()
        except ValueError:
            if number == 0:
                raise
            break  # weights driven too far: networks refuse images that are not finite, those between two steps too
        value = float(loss.detach())
        if not math.isfinite(value):
            break
        if value < least:
            best, least = start if number == 0 else ddf.detach(), value
        if number < steps:
            optimizer.zero_grad()
            loss.backward()
            if not all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
                break
            optimizer.step()
    return best


class FieldOptimization:
    """Improve a ddf by moving the displacements themselves.

    A residual displacement is added to the ddf and optimized by Adam, on a coarser grid of controls which are smoothed
    with a Gaussian and lifted to the voxels: this lets whole regions move at once where single voxels see no slope. The
    loss is `similarity(moved, fixed) + regularity_weight * DiffusionLoss(ddf - A)
    + folding_weight * mean(relu(0.1 - J)^2)` with `J` the change of volume of each cell between voxels, `ddf` the sum,
    and `A` the affine map that fits best where it starts: a turn is no lack of regularity.

    Images and ddf are first averaged over blocks of 4 and of 2 voxels, with three `levels`, and the steps taken there:
    larger moves are found, and a level costs an eighth of the next one in 3D. Levels on which an axis would have less
    than 8 voxels are left out.

    Everything is computed on the fixed grid, background included. On the CPU the same call gives the same answer.

    Args:
        steps: number of Adam steps on each level; 0 returns the ddf as it is.
        learning_rate: of Adam: about how far a control can move in a step, voxels of its level.
        similarity: loss `f(pred, target)`, or `f(pred, target, weight)` to be called with a weight, for images of 8
            voxels an axis and more; by default `LocalCorrelationLoss(sigma=2)`. `MINDSSCLoss(radius=1, dilation=1)`
            takes twice the time; it was better on MR images full of texture, and is not for smooth images or masks, of
            which it sees nothing but the edges.
        regularity_weight: factor of the diffusion; by default 0.05 for `MINDSSCLoss`, and 0.15 for others.
        folding_weight: factor of the penalty on cells that shrink below a tenth of their volume.
        spacing: distance of the controls in voxels.
        smoothing: standard deviation of the Gaussian, in controls; 0 is none.
        levels: number of resolutions; 1 is that of the images alone.
        progress: show a progress bar if `tqdm` is installed and standard error is a terminal.

    Raises:
        ValueError: if an option is not of these forms.

    Example:
        >>> from equireg.fields import identity_grid
        >>> cone = (8 - (identity_grid([25, 25]) - 12).norm(dim=1, keepdim=True)).clamp(min=0)
        >>> ddf = FieldOptimization(steps=20)(None, cone.roll(2, dims=2), cone, torch.zeros(1, 2, 25, 25))
        >>> [round(value) for value in ddf[0, :, 12, 12].tolist()]  # the moving image's cone lies two voxels further
        [2, 0]
    """

    def __init__(
        self,
        steps: int = 50,
        learning_rate: float = 1.0,
        similarity: Similarity | None = None,
        regularity_weight: float | None = None,
        folding_weight: float = 100.0,
        spacing: int = 2,
        smoothing: float = 1.0,
        levels: int = 3,
        progress: bool = False,
    ) -> None:
        self.similarity = LocalCorrelationLoss(sigma=2.0) if similarity is None else similarity
        if regularity_weight is None:
            regularity_weight = 0.05 if isinstance(self.similarity, MINDSSCLoss) else 0.15
        _check_options(
            "FieldOptimization",
            steps,
            learning_rate=learning_rate,
            regularity_weight=regularity_weight,
            folding_weight=folding_weight,
            smoothing=smoothing,
        )
        for name, count in (("spacing", spacing), ("levels", levels)):
            if not is_count(count, 1):
                raise ValueError(f"FieldOptimization expects {name} to be an integer of at least 1, got {count!r}.")
        self.steps = steps
        self.learning_rate = learning_rate
        self.regularity = DiffusionLoss()
        self.regularity_weight = regularity_weight
        self.folding_weight = folding_weight
        self.spacing = spacing
        self.smoothing = smoothing
        self.levels = levels
        self.progress = progress

    def __call__(
        self,
        network: nn.Module | None,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Improve the ddf of one pair.

        Args:
            network: not used; it is there so that all ways to optimize are called alike.
            moving: `(1, C, *moving shape)`, background 0.
            fixed: `(1, C, *fixed shape)`, background 0; the shapes may differ.
            ddf: `(1, D, *fixed shape)`, voxels, where to start.
            weight: `(1, 1, *fixed shape)`, not negative: how much each fixed voxel's similarity counts.

        Returns:
            `(1, D, *fixed shape)`, voxels, detached.

        Raises:
            ValueError: if shapes do not fit, or for a weight that is no such map.
        """
        with torch.inference_mode(False), torch.enable_grad():
            moving, fixed, start, weight = _tensors("FieldOptimization", moving, fixed, ddf, weight)
            if self.steps == 0:
                return start
            corner = torch.zeros([1, start.dim() - 2], dtype=torch.long, device=start.device)
            slopes = affine_slopes(start, corner, corner + torch.tensor(start.shape[2:], device=start.device) - 1)
            ddf, factors = start, self._factors([*moving.shape[2:], *fixed.shape[2:]])
            for factor in factors:
                ddf = self._level(factor, moving, fixed, ddf, slopes, weight)
            if len(factors) > 1:  # where the coarse levels led astray, the fine one goes alone
                with torch.no_grad():
                    free = _ramp(slopes, start)
                    before, after = (self._loss(moving, fixed, field, free, weight) for field in (start, ddf))
                if not bool(after <= before):
                    return self._level(1, moving, fixed, start, slopes, weight)
            return ddf

    def _factors(self, sizes: Sequence[int]) -> list[int]:
        """Return by how much each level is coarser than the images, the coarsest first."""
        return [2**k for k in range(self.levels - 1, -1, -1) if k == 0 or min(sizes) >= 8 * 2**k]

    def _level(
        self,
        factor: int,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        slopes: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the ddf after the steps of a level, `(1, D, *fixed shape)`, voxels."""
        moving, fixed, start = _averaged(moving, factor), _averaged(fixed, factor), _averaged(ddf, factor) / factor
        weight = None if weight is None else _averaged(weight, factor)
        coarse = start.shape[2:]
        controls = start.new_zeros([1, len(coarse)] + [-(-size // self.spacing) for size in coarse])
        controls.requires_grad_()
        free = _ramp(slopes, start)

        def objective() -> tuple[torch.Tensor, torch.Tensor]:
            total = start + self._lift(controls, coarse)
            return self._loss(moving, fixed, total, free, weight), total

        best = _descend(objective, [controls], start, self.steps, self.learning_rate, self.progress)
        return best if factor == 1 else ddf + _within(resize(best - start, factor), ddf.shape[2:])

    def _loss(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        free: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what is minimized, a scalar; `free` is the part of the ddf that regularity does not see."""
        moved = warp(moving, ddf, mode="linear", padding="zeros")
        loss = _compare(self.similarity, moved, fixed, weight)
        if self.regularity_weight:
            loss = loss + self.regularity_weight * self.regularity(ddf - free)
        if self.folding_weight:
            volume = jacobian_determinant(ddf, scheme="forward")
            loss = loss + self.folding_weight * torch.relu(_LEAST_VOLUME - volume).square().mean()
        return loss

    def _lift(self, controls: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the displacement `(1, D, *shape)` of the controls `(1, D, *coarse shape)`, both in fine voxels."""
        if self.smoothing:
            # The window is cut at the border: dividing by what is left of it keeps translations as they are.
            inside = gaussian_blur(torch.ones_like(controls[:, :1]), self.smoothing)
            controls = gaussian_blur(controls, self.smoothing) / inside
        return _within(resize(controls / self.spacing, self.spacing), shape)


def _ramp(slopes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the ddf of slopes `(1, D, D)` that is 0 at the first voxel, of the shape of `like`."""
    corner = torch.zeros([1, like.dim() - 2], dtype=torch.long, device=like.device)
    return continue_along(torch.zeros_like(like), slopes, corner, corner)


def _within(values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Cut the ends of the axes of `(1, C, *larger shape)`."""
    for axis, size in enumerate(shape):
        values = values.narrow(2 + axis, 0, size)
    return values


def _averaged(values: torch.Tensor, factor: int) -> torch.Tensor:
    """Average blocks of `(1, C, *shape)`; the last block of an axis is of the voxels that are left."""
    dims = values.dim() - 2
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    pads = [pad for size in reversed(values.shape[2:]) for pad in (0, -size % factor)]
    ones = functional.pad(torch.ones_like(values[:, :1]), pads)
    return pool(functional.pad(values, pads), factor) / pool(ones, factor) if factor > 1 else values


class NetworkOptimization:
    """Improve a ddf by training a copy of the network on the pair: the CARL paper's instance optimization.

    All weights of the copy are trained with Adam, in eval mode, so that the statistics of batch normalization stay as
    they are, through affine rounds and optical flow where the network has them, which takes much time and memory:
    `FieldOptimization` suits such networks better. The loss is the similarities of both directions plus
    `consistency_weight` times `GradICONLoss`, at the same points in every step. The network given is left as it was.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
    https://arxiv.org/abs/2405.16738.

    Args:
        steps: number of Adam steps; 0 returns the ddf as it is.
        learning_rate: of Adam.
        similarity: loss `f(pred, target)`, or `f(pred, target, weight)` to be called with a weight; by default
            `LocalCorrelationLoss(sigma=4)`.
        consistency_weight: factor of the inverse consistency.
        seed: draws the points at which consistency is measured.
        progress: show a progress bar if `tqdm` is installed and standard error is a terminal.

    Raises:
        ValueError: if an option is not of these forms.

    Example:
        >>> from equireg.networks import DisplacementUNet
        >>> moving, fixed = torch.rand(2, 1, 1, 16, 16)
        >>> net = DisplacementUNet(2, channels=(4, 8)).eval()
        >>> NetworkOptimization(steps=2)(net, moving, fixed, net(moving, fixed)).shape
        torch.Size([1, 2, 16, 16])
    """

    def __init__(
        self,
        steps: int = 50,
        learning_rate: float = 2e-5,
        similarity: Similarity | None = None,
        consistency_weight: float = 1.5,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        _check_options("NetworkOptimization", steps, learning_rate=learning_rate, consistency_weight=consistency_weight)
        self.steps = steps
        self.learning_rate = learning_rate
        self.similarity = LocalCorrelationLoss(sigma=4.0) if similarity is None else similarity
        self.consistency = GradICONLoss(seed=seed)
        self.consistency_weight = consistency_weight
        self.progress = progress

    def __call__(
        self,
        network: nn.Module,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Improve the ddf of one pair.

        Args:
            network: called `network(moving, fixed)`, the one whose answer `ddf` is.
            moving: `(1, C, *moving shape)`, background 0.
            fixed: `(1, C, *fixed shape)`, background 0; the shapes may differ.
            ddf: `(1, D, *fixed shape)`, voxels, the network's answer.
            weight: `(1, 1, *fixed shape)`, not negative: how much each fixed voxel's similarity counts. For the other
                direction it is carried along to the moving grid.

        Returns:
            `(1, D, *fixed shape)`, voxels, detached.

        Raises:
            ValueError: if the network has no weights, if shapes do not fit, or for a weight that is no such map.
        """
        with torch.inference_mode(False), torch.enable_grad():
            moving, fixed, start, weight = _tensors("NetworkOptimization", moving, fixed, ddf, weight)
            if self.steps == 0:
                return start
            trained = self._copy(network)

            def objective() -> tuple[torch.Tensor, torch.Tensor]:
                there, back = both(trained, moving, fixed)
                loss = self._similarities(moving, fixed, there, back, weight)
                if self.consistency_weight:
                    loss = loss + self.consistency_weight * self.consistency(there, back)
                return loss, full_precision(there)

            weights = list(trained.parameters())
            return _descend(objective, weights, start, self.steps, self.learning_rate, self.progress)

    def _copy(self, network: nn.Module) -> nn.Module:
        """Return a copy of the network in eval mode, with all weights open to training and no gradients."""
        with torch.no_grad():  # else the copies of a scripted network's weights are results, not weights
            trained = copy.deepcopy(network) if isinstance(network, nn.Module) else nn.Module()
        if not any(True for _ in trained.parameters()):
            raise ValueError(f"NetworkOptimization expects a network with weights to train, got {network!r:.200}.")
        for weights in trained.parameters():
            weights.grad = None
            weights.requires_grad_()  # weights one by one: a scripted network has no such method
        return trained.eval()

    def _similarities(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        there: torch.Tensor,
        back: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compare the images on the fixed grid, and on the moving grid."""
        moved = warp(moving, there, mode="linear", padding="zeros")
        moved_back = warp(fixed, back, mode="linear", padding="zeros")
        total = _compare(self.similarity, moved, fixed, weight)
        if weight is not None:
            weight = warp(weight, back.detach(), mode="linear", padding="zeros")
            if not (weight > 0).any():
                return total  # the field carries the region off the moving grid: nothing there to compare
        return total + _compare(self.similarity, moved_back, moving, weight)
