"""Measures of a registration against hand-made cases, in millimeters on oblique anisotropic grids."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers_grids import field, grid
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance

from equireg.evaluation import jsonable, landmark_error, overlap, regularity, round_trip
from equireg.landmarks import Landmarks
from equireg.world import as_field, invert_field, sample_transform


def label_of(values: np.ndarray, affine: np.ndarray | None = None) -> MetaTensor:
    return MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(np.eye(4) if affine is None else affine))


def two_blocks(dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Return label maps: label 3 shifted by two voxels along the first axis, label 7 in the first only."""
    a, b = (np.zeros((20, 12, 10)[:dims], dtype=np.int32) for _ in range(2))
    a[(slice(4, 10), *[slice(3, 8)] * (dims - 1))] = 3
    b[(slice(6, 12), *[slice(3, 8)] * (dims - 1))] = 3
    a[(slice(15, 17), *[slice(1, 3)] * (dims - 1))] = 7
    return a, b


@pytest.mark.parametrize("dims", [2, 3])
def test_overlap_of_blocks(dims: int) -> None:
    spacing = (1.5, 1.0, 0.7)[:dims]
    affine = grid(dims, 1, spacing=spacing)
    order = np.linalg.norm(affine[:dims, :dims], axis=0)  # which axis has which spacing is up to the grid
    a, b = two_blocks(dims)
    scores = overlap(label_of(a, affine), label_of(b, affine))
    assert scores["dice_3"] == pytest.approx(2 / 3) and scores["dice_7"] == 0.0
    assert scores["dice"] == pytest.approx(1 / 3)
    assert scores["hd95_mm_3"] == pytest.approx(2 * order[0], rel=1e-5)
    assert math.isnan(scores["hd95_mm_7"]) and scores["hd95_mm"] == scores["hd95_mm_3"]
    assert overlap(label_of(b, affine), label_of(b, affine))["dice"] == 1.0


def test_overlap_is_that_of_monai_on_the_whole_grid() -> None:
    random = np.random.default_rng(0)
    blocks = [random.integers(0, 4, (5, 4, 6)) for _ in range(2)]
    a, b = (np.kron(values, np.ones((3, 4, 3), dtype=np.int64)) for values in blocks)
    affine = np.diag([0.8, 1.1, 2.0, 1.0])
    scores = overlap(label_of(a, affine), label_of(b, affine))
    for value in (1, 2, 3):
        one, other = ((torch.from_numpy(labels) == value)[None, None].float() for labels in (a, b))
        distance = compute_hausdorff_distance(one, other, True, percentile=95, spacing=[0.8, 1.1, 2.0])
        assert scores[f"hd95_mm_{value}"] == pytest.approx(distance.item(), abs=1e-5)
        assert scores[f"dice_{value}"] == pytest.approx(compute_dice(one, other).item())


def test_labels_that_do_not_compare_are_refused() -> None:
    a, _ = two_blocks(2)
    with pytest.raises(ValueError, match="on one grid"):
        overlap(label_of(a), label_of(a[1:]))
    with pytest.raises(ValueError, match="both be empty"):
        overlap(label_of(0 * a), label_of(0 * a))


def test_landmarks_are_measured_where_the_transform_takes_them() -> None:
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([3.0, 0.0, 4.0])
    fixed = torch.rand(7, 3, dtype=torch.float64)
    moving = fixed + torch.tensor([3.0, 0.0, 4.0])
    moving[0, 1] += 0.7
    scores = landmark_error(Landmarks(fixed), Landmarks(moving), [shift])
    assert scores["tre_mm"] == pytest.approx(0.1) and scores["tre_mm_max"] == pytest.approx(0.7)
    assert scores["tre_mm_before"] == pytest.approx((6 * 5 + math.hypot(5, 0.7)) / 7)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_round_trip_is_measured_in_the_world(dims: int) -> None:
    shape = (14, 12, 10)[:dims]
    affine = grid(dims, 3)
    shift = torch.eye(dims + 1, dtype=torch.float64)
    shift[:dims, dims] = torch.tensor([0.3, -0.4, 0.0][:dims], dtype=torch.float64)
    there = sample_transform([shift], affine, shape)
    nothing = as_field(torch.zeros(dims, *shape), affine)
    assert round_trip(there, nothing)["inverse_consistency_mm"] == pytest.approx(0.5, rel=1e-4)
    far = sample_transform([torch.diag(torch.tensor([1.0] * dims + [1.0], dtype=torch.float64))], affine, shape)
    far = as_field(far + 1000.0, affine)
    assert math.isnan(round_trip(far, nothing)["inverse_consistency_mm"])
    warped = field(shape, affine, 1, strength=0.5)
    back = invert_field(warped, affine, shape)
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[(0, *[slice(3, 8)] * dims)] = True
    scores = round_trip(warped, back, mask)
    assert scores["inverse_consistency_mm"] < 0.05 and scores["inverse_consistency_mm_p95"] < 0.2
    assert scores["inverse_consistency_mm"] > 0


def test_regularity_counts_cells_in_percent() -> None:
    ddf = torch.zeros(2, 11, 11)
    ddf[0, 5, 5] = -3.0
    scores = regularity(MetaTensor(ddf, affine=torch.eye(4)))
    assert scores["folding_percent"] == pytest.approx(1.0)  # one cell of ten by ten
    assert scores["sd_log_jacobian"] > 0


def test_numbers_that_json_lacks_become_null() -> None:
    text = json.dumps(jsonable({"a": [math.nan, 1.0, (math.inf, "x")], "b": {"c": None}}), allow_nan=False)
    assert json.loads(text) == {"a": [None, 1.0, [None, "x"]], "b": {"c": None}}
