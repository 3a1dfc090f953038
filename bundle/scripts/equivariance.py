"""Measure whether a network's answer moves with its images, and assert that it does.

For a network `net(moving, fixed) -> ddf` with `phi(x) = x + ddf(x)`, moving the moving image's content by `V` and the
fixed one's by `U` should turn `phi` into `V o phi o U^-1`: the answer follows. That is the law of [W,U] equivariance,
with `W` the inverse of `V` since an image moved by `V` is the image composed with `V^-1`; [U,U] equivariance asks it of
common moves only. Written out for moves of whole voxels:

    moving content moved by s:  u'(x) = u(x) + s
    fixed content moved by s:   u'(x) = u(x - s) - s
    moving content turned by R: x + u'(x) = R (x + u(x))
    fixed content turned by R:  x + u'(x) = R^-1 x + u(R^-1 x)

An error is the distance, in voxels, between what a network answers and what the law says, at fixed voxels whose old
position lies on the old fixed canvas. No network can obey the law for all moves of all images: on an empty image every
move is invisible. `CARL` obeys it, to rounding, for the translations that `docs/decisions` names.

Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", CVPR 2025,
https://arxiv.org/abs/2405.16738. Measuring first and asserting by a thin wrapper is e3nn's way, https://e3nn.org.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import MetricReduction
from torch import nn
from torch.nn.functional import pad

from .fields import identity_grid
from .inferer import RegistrationInferer
from .metrics import _SampleMetric
from .moves import Move, read_at, rotation, smooth_warp, still, translation
from .networks.pair import PairNetwork
from .networks.rotation import rotation_group, turn_matrix

__all__ = [
    "KINDS",
    "SIDES",
    "TOLERANCE",
    "Cropped",
    "EquivarianceError",
    "assert_equivariant",
    "content_sensitivity",
    "equivariance_error",
    "error_map",
    "expected_ddf",
]

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

KINDS = ("translation", "rotation", "warp")
SIDES = ("moving", "fixed", "both", "independent")
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float64: 1e-8}  # voxels

_logger = logging.getLogger(__name__)


def expected_ddf(ddf: torch.Tensor, move_moving: Move, move_fixed: Move) -> tuple[torch.Tensor, torch.Tensor]:
    """Say what the answer must become when the images move.

    Args:
        ddf: `(B, D, *old fixed shape)`, voxels, the answer to the images as they were.
        move_moving: how the content of the moving image moves.
        move_fixed: how the content of the fixed image moves.

    Returns:
        `(B, D, *new fixed shape)`, voxels, float64; and `(1, 1, *new fixed shape)`, boolean: the voxels whose old
        position lies on the old fixed canvas. Elsewhere the law says nothing.

    Example:
        >>> up = translation([1, 0], (4, 3))
        >>> expected, known = expected_ddf(torch.zeros(1, 2, 4, 3), up, still((4, 3)))
        >>> expected[0, :, 0, 0].tolist(), bool(known.all())
        ([1.0, 0.0], True)
    """
    grid = identity_grid(list(move_fixed.shape), torch.float64, ddf.device)
    old = move_fixed.to_old(grid)
    last = torch.tensor([float(n - 1) for n in ddf.shape[2:]], dtype=old.dtype, device=ddf.device)
    last = last.reshape([1, -1] + [1] * (ddf.dim() - 2))
    known = ((old > -1e-6) & (old < last + 1e-6)).all(dim=1, keepdim=True)  # rounding must not cost the border
    found = old + read_at(ddf, old)
    return move_moving.to_new(found) - grid, known


def _ask(network: Network, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Call a network in eval mode, without gradients, and leave each of its parts in the mode it was in."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            return network(moving, fixed)
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def error_map(
    network: Network,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    move_moving: Move | None = None,
    move_fixed: Move | None = None,
    ddf: torch.Tensor | None = None,
    answer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Measure at every voxel how far the answer is from following one move of the images.

    Args:
        network: called `network(moving, fixed)`, returns a ddf; a module is put in eval mode for the call.
        moving: `(B, C, *moving shape)`, background 0.
        fixed: `(B, C, *fixed shape)`, background 0.
        move_moving: how the moving content moves; left out, it stays.
        move_fixed: how the fixed content moves; left out, it stays.
        ddf: the answer to the images as they are, if it is known already.
        answer: the answer to the moved images, if it is known already.

    Returns:
        `(B, *new fixed shape)`, voxels, float64; infinite where an answer is not finite, NaN where the old position
        lies outside the old fixed canvas.

    Example:
        >>> def lazy(moving, fixed):
        ...     return torch.zeros(1, 2, *fixed.shape[2:])
        >>> image = torch.ones(1, 1, 4, 4)
        >>> error_map(lazy, image, image, translation([3, 4], (8, 8))).unique().tolist()
        [5.0]
    """
    move_moving = move_moving or still(moving.shape[2:])
    move_fixed = move_fixed or still(fixed.shape[2:])
    ddf = _ask(network, moving, fixed) if ddf is None else ddf
    if answer is None:
        answer = _ask(network, move_moving.image(moving), move_fixed.image(fixed))
    expected, known = expected_ddf(ddf, move_moving, move_fixed)
    error = (answer.double() - expected).norm(dim=1)
    error = torch.where(error.isfinite(), error, torch.inf)  # NaN is kept for what is not known
    return torch.where(known[:, 0], error, torch.nan)


def _draw(kind: str, shape: Sequence[int], max_shift: int, sigma: float, generator: np.random.Generator) -> Move:
    """Draw a move that is not the identity."""
    if kind == "translation":
        while not any(by := [int(generator.integers(-max_shift, max_shift + 1)) for _ in shape]):
            continue
        return translation(by, shape)
    if kind == "rotation":
        turns = rotation_group(len(shape), "grid")[1:]
        return rotation(turn_matrix(*turns[generator.integers(len(turns))]), shape)
    return smooth_warp(shape, sigma, generator)


def _moves(kind: str, side: str, shape: Sequence[int], *amounts: Any) -> tuple[Move, Move]:
    """Draw the moves of both images."""
    first = _draw(kind, shape, *amounts)
    if side == "both":
        return first, first
    second = _draw(kind, shape, *amounts) if side == "independent" else still(shape)
    return (second, first) if side == "fixed" else (first, second)


def _on_one_canvas(moving: torch.Tensor, fixed: torch.Tensor, margin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad both images with background to one shape and by a margin, so that no content is lost when it moves."""
    shape = [max(sizes) for sizes in zip(moving.shape[2:], fixed.shape[2:])]

    def grow(image: torch.Tensor) -> torch.Tensor:
        after = [margin + new - old for new, old in zip(shape, image.shape[2:])]
        return pad(image, [n for right in reversed(after) for n in (margin, right)])

    return grow(moving), grow(fixed)


def _largest(errors: torch.Tensor) -> torch.Tensor:
    """Return the largest known error of each sample, `(B,)`."""
    errors = errors.flatten(1)
    if bool(errors.isnan().all(dim=1).any()):
        raise ValueError("no voxel of the moved fixed image lies on its old canvas: there is nothing to compare.")
    return errors.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)


def _check(kinds: Sequence[str], sides: Sequence[str], trials: int, max_shift: int) -> None:
    for name, values, known in (("kinds", kinds, KINDS), ("sides", sides, SIDES)):
        if isinstance(values, str) or not values or not set(values) <= set(known):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {values!r}.")
    if trials < 1 or max_shift < 1:
        raise ValueError(f"trials and max_shift must be at least 1, got {trials} and {max_shift}.")


def equivariance_error(
    network: Network,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    *,
    kinds: Sequence[str] = KINDS,
    sides: Sequence[str] = SIDES,
    trials: int = 3,
    max_shift: int = 8,
    sigma: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Measure how far a network is from following random moves of its images.

    Both images are first padded with background to one canvas with `max_shift` voxels around, so that no translation
    loses content. Translations are by whole voxels, rotations are the grid's (90 and 180 degrees), warps are smooth and
    interpolate the images, so that their error is never exactly zero.

    Args:
        network: called `network(moving, fixed)`, returns a ddf `(B, D, *fixed shape)`; a module is put in eval mode.
        moving: `(B, C, *moving shape)`, background 0, D = 2 or 3.
        fixed: `(B, C, *fixed shape)`, background 0.
        kinds: "translation", "rotation", "warp", any of them.
        sides: which images move: "moving", "fixed", "both" alike ([U,U]) or "independent"ly ([W,U]), any of them.
        trials: random moves of each kind.
        max_shift: largest translation along an axis, voxels.
        sigma: standard deviation of the displacement of a warp, voxels.
        seed: of the moves.

    Returns:
        For each kind and side, named like "translation of moving", the largest error over voxels and trials, in voxels.

    Raises:
        ValueError: for an unknown kind or side, or less than one trial or voxel.

    Example:
        >>> from equireg.networks import CoordinateAttention
        >>> network, images = CoordinateAttention(2, feature_channels=8), torch.rand(2, 1, 1, 9, 8)
        >>> errors = equivariance_error(network, *images, kinds=["translation"])
        >>> list(errors), max(errors.values()) < 1e-3
        (['translation of moving', ..., 'translation of independent'], True)
    """
    _check(kinds, sides, trials, max_shift)
    moving, fixed = _on_one_canvas(moving, fixed, max_shift)
    generator = np.random.default_rng(seed)
    ddf = _ask(network, moving, fixed)
    errors: dict[str, float] = {}
    for kind in kinds:
        for side in sides:
            name = f"{kind} of {side}"
            errors[name] = 0.0
            for _ in range(trials):
                moves = _moves(kind, side, moving.shape[2:], max_shift, sigma, generator)
                error = _largest(error_map(network, moving, fixed, *moves, ddf=ddf)).max().item()
                errors[name] = max(errors[name], error)
    return errors


def content_sensitivity(network: Network, moving: torch.Tensor, fixed: torch.Tensor, seed: int = 0) -> float:
    """Measure how much the answer changes, beyond a common translation, when the values inside the moving content do.

    A network that matches nothing but boxes or centroids follows every translation, and answers none of the questions a
    registration is for. When the content's values change places within it, such an answer stays, or moves as one. Where
    all values are the same (a binary mask), they are scaled at random, by 0.5 to 1, instead.

    Args:
        network: as for `equivariance_error`.
        moving: `(B, C, *moving shape)`, background 0.
        fixed: `(B, C, *fixed shape)`.
        seed: of the permutation.

    Returns:
        Largest change over voxels of the difference to the mean displacement, voxels; of the sample where it is least.

    Example:
        >>> def boxes(moving, fixed):
        ...     return torch.ones(1, 2, *fixed.shape[2:])
        >>> content_sensitivity(boxes, torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4))
        0.0
    """
    permuted = moving.clone()
    generator = torch.Generator().manual_seed(seed)
    for image in permuted:
        content = (image != 0).any(dim=0)
        values = image[:, content]
        if bool((values == values[:, :1]).all()):
            scales = 0.5 + 0.5 * torch.rand(values.shape[1], generator=generator)
            image[:, content] = values * scales.to(values)
        else:
            image[:, content] = values[:, torch.randperm(values.shape[1], generator=generator).to(values.device)]
    change = (_ask(network, permuted, fixed) - _ask(network, moving, fixed)).double()
    mean = change.flatten(2).mean(dim=2).reshape([*change.shape[:2]] + [1] * (change.dim() - 2))
    return (change - mean).norm(dim=1).flatten(1).amax(dim=1).min().item()


def assert_equivariant(
    network: Network,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    *,
    kinds: Sequence[str] = ("translation",),
    sides: Sequence[str] = SIDES,
    tolerance: float | Mapping[torch.dtype, float] | None = None,
    least_change: float = 0.01,
    **options: Any,
) -> dict[str, float]:
    """Assert that a network follows its images and looks at them, and log by how much it does not, also on success.

    Args:
        network: as for `equivariance_error`.
        moving: `(B, C, *moving shape)`; its type decides the tolerance.
        fixed: `(B, C, *fixed shape)`.
        kinds: as for `equivariance_error`.
        sides: as for `equivariance_error`.
        tolerance: largest error allowed, voxels, or one for each type; `TOLERANCE` if left out: 1e-3 in float32 and
            1e-8 in float64.
        least_change: how much the answer must change at least, voxels, when values inside the content change places,
            see `content_sensitivity`; 0 to accept a network that answers boxes or centroids.
        options: further arguments of `equivariance_error`.

    Returns:
        What `equivariance_error` returned.

    Raises:
        AssertionError: naming the errors above the tolerance, or if the answer does not depend on the content.
        ValueError: if there is no tolerance for the type.

    Example:
        >>> def lazy(moving, fixed):
        ...     return torch.zeros(1, 2, *fixed.shape[2:])
        >>> image = torch.ones(1, 1, 4, 4)
        >>> _ = assert_equivariant(lazy, image, image, sides=["both"], least_change=0)
        >>> assert_equivariant(lazy, image, image, sides=["moving"])
        Traceback (most recent call last):
        AssertionError: not equivariant to 0.001 voxel: translation of moving ...
    """
    __tracebackhide__ = True
    allowed = TOLERANCE if tolerance is None else tolerance
    if isinstance(allowed, Mapping):
        if moving.dtype not in allowed:
            raise ValueError(f"no tolerance for {moving.dtype}, expected one of {', '.join(map(str, allowed))}.")
        allowed = allowed[moving.dtype]
    errors = equivariance_error(network, moving, fixed, kinds=kinds, sides=sides, **options)
    report = {name: f"{name} {error:.2g}" for name, error in errors.items()}
    _logger.info("equivariance errors, voxels: %s", ", ".join(report.values()))
    # Not "greater": an error that is not a number is none to be content with.
    missed = [report[name] for name, error in errors.items() if not error <= allowed]
    if missed:
        raise AssertionError(f"not equivariant to {allowed:g} voxel: {', '.join(missed)}.")
    if least_change > 0 and not content_sensitivity(network, moving, fixed) >= least_change:
        raise AssertionError(
            f"the answer hardly changes (by less than {least_change:g} voxel) when values inside the content change "
            "places: it follows the content's outline, not what it is."
        )
    return errors


class Cropped(nn.Module):
    """A network as `RegistrationInferer` runs it, each image cropped to its content: what files are registered with.

    Args:
        net: a network called `net(moving, fixed)`.
        margin: voxels of background kept around each content.

    Example:
        >>> from equireg.networks import DisplacementUNet
        >>> images = torch.rand(2, 1, 1, 9, 8)
        >>> _ = assert_equivariant(Cropped(DisplacementUNet(2, channels=(4, 8))), *images, least_change=0)
    """

    def __init__(self, net: nn.Module, margin: int = 4) -> None:
        super().__init__()
        self.net = PairNetwork(net).eval()
        self.inferer = RegistrationInferer(margin)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair; arguments and result as for any network."""
        return self.inferer(moving, self.net, fixed=fixed)[:, : fixed.dim() - 2]


class EquivarianceError(_SampleMetric):
    """Largest distance between a network's answer and what equivariance demands, as a MONAI metric, voxels.

    Called with `y_pred` and `y`, the moving and the fixed images `(B, C, *shape)` or lists of `(C, *shape)`: with
    MONAI's handler, `output_transform=from_engine(["moving", "fixed"])`. The moves are those of `equivariance_error`,
    the same for every sample.

    Args:
        network: called `network(moving, fixed)`, returns a ddf.
        kind: "translation", "rotation" or "warp".
        side: "moving", "fixed", "both" or "independent".
        trials: random moves per pair.
        reduction: how samples are joined, see `monai.metrics.do_metric_reduction`.
        options: further arguments of `equivariance_error`: `max_shift`, `sigma`, `seed`.

    Raises:
        ValueError: for an unknown kind or side; if called without `y`.

    Example:
        >>> from equireg.networks import DisplacementUNet
        >>> metric = EquivarianceError(DisplacementUNet(2, channels=(4, 8)), side="both")
        >>> metric(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)).shape, metric.aggregate().item()
        (torch.Size([2, 1]), 0.0)
    """

    def __init__(
        self,
        network: Network,
        kind: str = "translation",
        side: str = "independent",
        trials: int = 1,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        **options: Any,
    ) -> None:
        super().__init__(reduction)
        _check([kind], [side], trials, options.get("max_shift", 1))
        self.network, self.options = network, {"kinds": [kind], "sides": [side], "trials": trials, **options}

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None:
            raise ValueError("EquivarianceError expects y_pred and y, the moving and the fixed images, got no y.")
        pairs = zip(y_pred.split(1), y.split(1))
        values = [max(equivariance_error(self.network, *pair, **self.options).values()) for pair in pairs]
        return torch.tensor(values, device=y_pred.device)[:, None]
