"""Quality of ddfs: folding, smoothness, inverse consistency and distance of landmarks.

Each measure is a function that returns one value per sample, and a thin MONAI metric over it that works with
`monai.handlers.IgniteMetricHandler` and `MetricsSaver`. All are better when lower, so as key metrics they want
`metric_cmp_fn` of the evaluator and `key_metric_negative_sign` of `CheckpointSaver`. For similarity losses there is
`monai.metrics.LossMetric`; for overlap and surface distances MONAI has its own metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

import torch
from monai.metrics import CumulativeIterationMetric, do_metric_reduction
from monai.utils import MetricReduction, convert_to_tensor

from .blocks import blocks
from .fields import compose, full_precision, jacobian_determinant
from .threads import in_threads

__all__ = [
    "FoldingFraction",
    "InverseConsistencyError",
    "Regularity",
    "SDLogJacobian",
    "TargetRegistrationError",
    "folding_fraction",
    "inverse_consistency_error",
    "sd_log_jacobian",
    "target_registration_error",
]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor in float32, or float64 where it was."""
    return full_precision(convert_to_tensor(tensor, track_meta=False))


def _determinants(ddf: torch.Tensor, scheme: str) -> Iterator[torch.Tensor]:
    """Return the determinants of the Jacobian, `(B, n)` at a time, so that no more of them are in memory."""
    before = int(scheme == "central")  # neighbors that a block needs
    cells = [max(n - 1 + before, 1) for n in ddf.shape[2:]]

    def part(where: tuple[slice, ...]) -> torch.Tensor:
        read = tuple(slice(max(cut.start - before, 0), cut.stop + 1) for cut in where[1:])
        keep = tuple(slice(cut.start - more.start, cut.stop - more.start) for cut, more in zip(where[1:], read))
        determinant = jacobian_determinant(ddf[(slice(None), slice(None)) + read], scheme)
        return determinant[(slice(None), slice(None)) + keep].flatten(1)

    return in_threads(part, blocks(cells))


def folding_fraction(ddf: torch.Tensor) -> torch.Tensor:
    """Return the share of cells in which a ddf folds space.

    A cell lies between neighboring voxels along each axis; it is folded unless the determinant of the Jacobian by
    forward differences is positive, so an undefined one counts as folded. Forward differences also see the fold of a
    single voxel, which central differences step over.

    Args:
        ddf: `(B, D, *spatial)`, voxels, D from 1 to 3.

    Returns:
        `(B,)`, from 0 to 1.

    Raises:
        ValueError: if the shape is not of that form.

    Example:
        >>> from .fields import identity_grid
        >>> folding_fraction(-2.0 * identity_grid([4, 4, 4]))  # mirrors every axis
        tensor([1.])
    """
    ddf = _plain(ddf)
    folded, cells = torch.zeros(len(ddf), dtype=ddf.dtype, device=ddf.device), 0
    for determinant in _determinants(ddf, "forward"):
        folded += (~(determinant > 0)).sum(dim=1)
        cells += determinant.shape[1]
    return folded / cells


def sd_log_jacobian(ddf: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the logarithm of the local volume change (SDlogJ).

    The Jacobian is taken at the voxels by central differences. Voxels whose determinant is not positive have no
    logarithm and are left out: `folding_fraction` counts folds. The standard deviation is that of the population
    (divided by the number of voxels).

    Reference: Chan et al., "Algorithms for computing the sample variance", The American Statistician 37(3), 1983,
    https://doi.org/10.1080/00031305.1983.10483115, for joining the moments of parts.

    Args:
        ddf: `(B, D, *spatial)`, voxels, D from 1 to 3.

    Returns:
        `(B,)`, no unit; 0 for translations and uniform scalings, NaN for a sample that is folded everywhere.

    Raises:
        ValueError: if the shape is not of that form.

    Example:
        >>> sd_log_jacobian(torch.zeros(1, 2, 4, 4))
        tensor([0.])
    """
    ddf = _plain(ddf)
    count, mean, squares = torch.zeros(3, len(ddf), 1, dtype=torch.float64, device=ddf.device)
    for determinant in _determinants(ddf, "central"):
        valid = determinant > 0
        more = valid.sum(dim=1, keepdim=True)
        log = torch.where(valid, determinant, 1.0).log()  # log(1) = 0: the voxels left out add nothing to the mean
        change = log.sum(dim=1, keepdim=True, dtype=torch.float64) / more.clamp(min=1) - mean
        deviation = torch.where(valid, log - (mean + change), 0.0)
        share = more / (count + more).clamp(min=1)
        squares += deviation.square().sum(dim=1, keepdim=True) + change.square() * count * share
        mean, count = mean + change * share, count + more
    return (squares / count)[:, 0].sqrt().to(ddf.dtype)


def target_registration_error(points_a_mm: torch.Tensor, points_b_mm: torch.Tensor) -> torch.Tensor:
    """Return the mean distance between corresponding points (TRE).

    Args:
        points_a_mm: `(B, N, D)`, millimeters, for example fixed landmarks mapped by `fixed_to_moving`.
        points_b_mm: `(B, N, D)`, millimeters in the same frame, for example moving landmarks.

    Returns:
        `(B,)`, millimeters.

    Raises:
        ValueError: if the shapes differ, are not of that form, or hold no point.

    Example:
        >>> target_registration_error(torch.zeros(1, 5, 3), torch.tensor([0.0, 3.0, 4.0]).expand(1, 5, 3))
        tensor([5.])
    """
    a, b = _plain(points_a_mm), _plain(points_b_mm)
    if a.shape != b.shape or a.dim() != 3 or a.shape[1] == 0:
        raise ValueError(
            "target_registration_error expects two sets of points of one shape (B, N, D) with N of at least 1, "
            f"got {list(a.shape)} and {list(b.shape)}."
        )
    return (a - b).norm(dim=2).mean(dim=1)


def inverse_consistency_error(ddf_fixed_to_moving: torch.Tensor, ddf_moving_to_fixed: torch.Tensor) -> torch.Tensor:
    """Return the mean distance by which fixed voxels miss their start on the way to the moving image and back.

    Every fixed voxel counts; where it is sent off the moving grid, `ddf_moving_to_fixed` continues as its border
    values.

    Args:
        ddf_fixed_to_moving: `(B, D, *fixed shape)`, voxels, D = 2 or 3.
        ddf_moving_to_fixed: `(B, D, *moving shape)`, voxels; the two shapes may differ.

    Returns:
        `(B,)`, voxels.

    Raises:
        ValueError: if the shapes are not of that form, or B and D differ.

    Example:
        >>> there = torch.full((1, 2, 8, 8), 2.0)
        >>> inverse_consistency_error(there, -there)
        tensor([0.])
    """
    there, back = _plain(ddf_fixed_to_moving), _plain(ddf_moving_to_fixed)
    dims = there.dim() - 2
    if dims not in (2, 3) or there.shape[1] != dims or back.dim() != dims + 2 or there.shape[:2] != back.shape[:2]:
        raise ValueError(
            "inverse_consistency_error expects ddfs (B, D, *fixed shape) and (B, D, *moving shape) with D = 2 or 3 "
            f"spatial axes, got {list(there.shape)} and {list(back.shape)}."
        )
    return compose(back, there).norm(dim=1).flatten(1).mean(dim=1)


class _SampleMetric(CumulativeIterationMetric):
    """Collect one value per sample and reduce them as MONAI does.

    Args:
        reduction: how MONAI's `do_metric_reduction` joins the samples; NaN samples are left out.
        get_not_nans: let `aggregate` return the number of samples that were not NaN as well.
    """

    def __init__(self, reduction: MetricReduction | str = MetricReduction.MEAN, get_not_nans: bool = False) -> None:
        super().__init__()
        self.reduction = reduction
        self.get_not_nans = get_not_nans

    def aggregate(self, reduction: MetricReduction | str | None = None) -> Any:
        """Reduce the values collected since the last `reset`.

        Args:
            reduction: used in place of the one given at construction.

        Returns:
            the reduced value, or with `get_not_nans` a tuple of it and the number of samples behind it.

        Raises:
            ValueError: if nothing was collected.
        """
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError(f"{type(self).__name__} expects at least one sample before aggregate(), got none.")
        value, count = do_metric_reduction(data, reduction or self.reduction)
        # MONAI answers 0 where all samples are NaN, the best value of every metric here.
        value = torch.where(count > 0, value, torch.nan)
        return (value, count) if self.get_not_nans else value


class FoldingFraction(_SampleMetric):
    """Share of cells in which a ddf folds space; see `folding_fraction`.

    Called with `y_pred`, a ddf `(B, D, *spatial)` or a list of `(D, *spatial)`, in voxels. Channels after the first D
    are ignored, so the prediction of a pair network can be given as it is; so is `y`, which MONAI's handler demands.

    Example:
        >>> metric = FoldingFraction()
        >>> metric(torch.zeros(2, 3, 4, 4, 4)).shape, metric.aggregate().item()
        (torch.Size([2, 1]), 0.0)
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return folding_fraction(y_pred[:, : y_pred.dim() - 2])[:, None]


class SDLogJacobian(_SampleMetric):
    """Standard deviation of the logarithm of the local volume change; see `sd_log_jacobian`.

    Called like `FoldingFraction`. Samples folded everywhere have no value and are left out of the mean.

    Example:
        >>> metric = SDLogJacobian()
        >>> metric([torch.zeros(2, 4, 4)]).shape, metric.aggregate().item()
        (torch.Size([1, 1]), 0.0)
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return sd_log_jacobian(y_pred[:, : y_pred.dim() - 2])[:, None]


class Regularity(_SampleMetric):
    """Value of a loss on ddfs alone, such as `equireg.losses.DiffusionLoss`; called like `FoldingFraction`.

    Args:
        loss: called `loss(ddf)` with a batch of one, returns a scalar.
        reduction: how samples are joined, see `monai.metrics.do_metric_reduction`.

    Example:
        >>> metric = Regularity(lambda ddf: ddf.abs().mean())
        >>> metric(torch.ones(2, 2, 4, 4)).flatten().tolist()
        [1.0, 1.0]
    """

    def __init__(
        self, loss: Callable[[torch.Tensor], torch.Tensor], reduction: MetricReduction | str = MetricReduction.MEAN
    ) -> None:
        super().__init__(reduction)
        self.loss = loss

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        ddfs = y_pred[:, : y_pred.dim() - 2].split(1)
        return torch.stack([self.loss(ddf) for ddf in ddfs])[:, None]


class TargetRegistrationError(_SampleMetric):
    """Mean distance between corresponding points in millimeters; see `target_registration_error`.

    Called with `y_pred` and `y`, points `(B, N, D)` or, where N differs between samples, lists of `(N, D)`.

    Raises:
        ValueError: if called without `y`.

    Example:
        >>> metric = TargetRegistrationError()
        >>> _ = metric([torch.zeros(5, 3), torch.zeros(9, 3)], [torch.ones(5, 3), torch.zeros(9, 3)])
        >>> round(metric.aggregate().item(), 4)
        0.866
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None:
            raise ValueError("TargetRegistrationError expects points y_pred and y, got no y.")
        return target_registration_error(y_pred, y)[:, None]


class InverseConsistencyError(_SampleMetric):
    """Mean distance in voxels by which going to the moving image and back misses; see `inverse_consistency_error`.

    Called with `y_pred`, the ddf from fixed to moving, and `y`, the ddf from moving to fixed, both in voxels.

    Raises:
        ValueError: if called without `y`.

    Example:
        >>> metric = InverseConsistencyError()
        >>> _ = metric(torch.full((1, 2, 8, 8), 3.0), torch.full((1, 2, 6, 9), -3.0))
        >>> metric.aggregate().item()
        0.0
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None:
            raise ValueError("InverseConsistencyError expects ddfs y_pred and y, got no y.")
        return inverse_consistency_error(y_pred, y)[:, None]
