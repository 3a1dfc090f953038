"""How good a registration is: overlap of labels, distance of landmarks, folding, and the way there and back.

Every measure returns a flat dictionary of plain numbers, ready for a table. Lengths are in millimeters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance

from .blocks import spaced_voxels
from .landmarks import Landmarks
from .metrics import folding_fraction, sd_log_jacobian, target_registration_error
from .spaces import apply_affine
from .world import field_affine, map_points

__all__ = ["jsonable", "landmark_error", "overlap", "regularity", "round_trip"]

_ROUND_TRIPS = 50_000  # voxels from which the way there and back is taken


def overlap(moved_label: MetaTensor, fixed_label: MetaTensor) -> dict[str, float]:
    """Compare two label maps on one grid, label by label.

    Labels that occur in either map count; 0 is background. A label that is missing in one map has Dice 0 and no
    surface distance.

    Args:
        moved_label: `(1, *shape)`, integers.
        fixed_label: `(1, *shape)`, integers, with the affine that gives voxels their size.

    Returns:
        "dice" and "hd95_mm", the means over labels, and for each label `l` "dice_l" and "hd95_mm_l", the 95th
        percentile of the distance between surfaces; NaN where there is none.

    Raises:
        ValueError: if the shapes differ, or both maps are empty.

    Example:
        >>> label = MetaTensor(torch.zeros(1, 6, 6, dtype=torch.int64), affine=torch.eye(4))
        >>> label[0, 2:4, 2:4] = 5
        >>> overlap(label, label)
        {'dice': 1.0, 'hd95_mm': 0.0, 'dice_5': 1.0, 'hd95_mm_5': 0.0}
    """
    a, b = moved_label.as_tensor(), fixed_label.as_tensor()
    if a.shape != b.shape:
        raise ValueError(f"labels to compare should be on one grid, got shapes {list(a.shape)} and {list(b.shape)}.")
    labels = sorted({*a.unique().tolist(), *b.unique().tolist()} - {0})
    if not labels:
        raise ValueError("labels to compare should not both be empty.")
    dims = a.dim() - 1
    spacing = field_affine(fixed_label)[:dims, :dims].norm(dim=0).tolist()
    scores: dict[str, float] = {}
    for label in labels:
        one, other = _cropped(a == label, b == label)
        scores[f"dice_{label:g}"] = compute_dice(one, other, ignore_empty=False).item()
        scores[f"hd95_mm_{label:g}"] = math.nan
        if bool(one.any()) and bool(other.any()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of its own call
                distance = compute_hausdorff_distance(one, other, True, percentile=95, spacing=spacing)
            scores[f"hd95_mm_{label:g}"] = distance.item()
    means = {name: _mean([v for k, v in scores.items() if k.startswith(f"{name}_")]) for name in ("dice", "hd95_mm")}
    return {**means, **scores}


def landmark_error(
    fixed_points: Landmarks, moving_points: Landmarks, fixed_to_moving: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Measure how far fixed landmarks, taken to the moving image, lie from their counterparts there.

    Args:
        fixed_points: N landmarks in the fixed image.
        moving_points: their N counterparts in the moving image, in the same order.
        fixed_to_moving: the transform, see `equireg.world`.

    Returns:
        "tre_mm", the mean distance, its "tre_mm_max", and "tre_mm_before", the mean without the transform.

    Example:
        >>> points = Landmarks(torch.zeros(2, 3))
        >>> landmark_error(points, points, [])
        {'tre_mm': 0.0, 'tre_mm_max': 0.0, 'tre_mm_before': 0.0}
    """
    fixed, moving = fixed_points.points_mm, moving_points.points_mm
    found = map_points(fixed, fixed_to_moving)
    return {
        "tre_mm": target_registration_error(found[None], moving[None]).item(),
        "tre_mm_max": (found - moving).norm(dim=1).max().item(),
        "tre_mm_before": target_registration_error(fixed[None], moving[None]).item(),
    }


def regularity(field: MetaTensor) -> dict[str, float]:
    """Measure how smooth a displacement field is.

    Args:
        field: `(D, *shape)`.

    Returns:
        "folding_percent", the share of cells that fold, and "sd_log_jacobian"; see `equireg.metrics`.

    Example:
        >>> regularity(MetaTensor(torch.zeros(2, 4, 4), affine=torch.eye(4)))
        {'folding_percent': 0.0, 'sd_log_jacobian': 0.0}
    """
    ddf = field.as_tensor()[None]
    return {"folding_percent": 100 * folding_fraction(ddf).item(), "sd_log_jacobian": sd_log_jacobian(ddf).item()}


def round_trip(there: MetaTensor, back: MetaTensor, mask: torch.Tensor | None = None) -> dict[str, float]:
    """Measure by how much points miss their start on the way through two fields.

    Args:
        there: displacement field `(D, *shape)`, from fixed to moving points.
        back: displacement field from moving to fixed points.
        mask: `(1, *shape)`, the fixed voxels that start; all of them if left out. Those that end up outside the grid of
            `back`, where it is not known, do not count.

    Returns:
        "inverse_consistency_mm", the mean, and "inverse_consistency_mm_p95"; NaN if no voxel ends inside.

    Example:
        >>> shift = MetaTensor(torch.full((2, 4, 4), 1.0), affine=torch.eye(4))
        >>> round_trip(shift, -shift)
        {'inverse_consistency_mm': 0.0, 'inverse_consistency_mm_p95': 0.0}
    """
    shape = there.shape[1:]
    start = spaced_voxels(shape, mask, _ROUND_TRIPS)
    index = torch.stack(torch.unravel_index(start, shape)).double()
    points = apply_affine(field_affine(there), index).T
    there_points = map_points(points, [there])
    end = apply_affine(torch.linalg.inv(field_affine(back)), there_points.T).T
    inside = ((end >= 0) & (end <= torch.tensor(back.shape[1:]) - 1)).all(dim=1)
    if not bool(inside.any()):
        return {"inverse_consistency_mm": math.nan, "inverse_consistency_mm_p95": math.nan}
    miss = (map_points(there_points[inside], [back]) - points[inside]).norm(dim=1)
    return {
        "inverse_consistency_mm": miss.mean().item(),
        "inverse_consistency_mm_p95": torch.quantile(miss, 0.95).item(),
    }


def jsonable(value: Any) -> Any:
    """Return a nested value with NaN and infinity as None, which JSON has.

    Example:
        >>> jsonable({"a": [math.nan, 1.0]})
        {'a': [None, 1.0]}
    """
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cropped(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut two masks `(1, *shape)` to where either is true and a voxel more; add a batch axis. Distances stay."""
    hits = (a | b)[0].nonzero()
    box = tuple(slice(max(int(h.min()) - 1, 0), int(h.max()) + 2) for h in hits.T)
    return a[(slice(None),) + box][None].float(), b[(slice(None),) + box][None].float()


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
