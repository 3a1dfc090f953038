"""Fields and affines in the world, against SimpleITK and analytic answers, on oblique grids that differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers_grids import centered, field, grid, image, lps, smooth, to_itk
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates

from equireg import blocks
from equireg.fields import warp
from equireg.io import write_displacement_field
from equireg.spaces import apply_affine
from equireg.world import (
    affine_inverse,
    as_field,
    best_affine,
    field_affine,
    index_displacement,
    invert_field,
    invert_transform,
    map_points,
    sample_transform,
    split_affine,
    warp_image,
)

SHAPES = {2: ((23, 31), (29, 19)), 3: ((17, 23, 14), (21, 15, 19))}


def pair(dims: int, seed: int) -> tuple[MetaTensor, MetaTensor]:
    """Return a moving image and a field that leads to it, on unrelated grids that overlap."""
    moving_shape, fixed_shape = SHAPES[dims]
    moving = image(moving_shape, centered(grid(dims, seed), moving_shape, [5.0] * dims), seed)
    there = field(fixed_shape, centered(grid(dims, seed + 100), fixed_shape, [4.0] * dims), seed)
    return moving, there


def random_affine(dims: int, seed: int, strength: float = 0.2) -> torch.Tensor:
    random = np.random.default_rng(seed)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] += strength * random.normal(size=(dims, dims))
    matrix[:dims, dims] = random.uniform(-10, 10, dims)
    return torch.from_numpy(matrix)


def well_inside(moving: MetaTensor, there: MetaTensor) -> np.ndarray:
    """Return where a field leads at least a voxel into the moving grid."""
    index = index_displacement(there, moving).numpy() + np.indices(there.shape[1:])
    size = np.reshape(moving.shape[1:], [-1] + [1] * (there.dim() - 1))
    return ((index >= 1) & (index <= size - 2)).all(axis=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dims", [2, 3])
def test_warping_equals_itk_resampling_through_the_file(dims: int, seed: int, tmp_path: Path) -> None:
    moving, there = pair(dims, seed)
    path = write_displacement_field(there, there.affine, tmp_path / "there.nii.gz")
    vectors = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(vectors)
    reference = to_itk(MetaTensor(torch.zeros(1, *there.shape[1:]), affine=there.affine))
    theirs = sitk.GetArrayFromImage(sitk.Resample(to_itk(moving), reference, transform, sitk.sitkLinear, 0.0)).T
    ours = warp_image(moving, there)
    inside = well_inside(moving, there)
    assert inside.sum() > 200  # the test looks at something
    span = (moving.max() - moving.min()).item()
    assert np.abs(ours[0].numpy() - theirs)[inside].max() < 1e-5 * span
    assert torch.equal(ours.affine, there.affine)


@pytest.mark.parametrize("dims", [2, 3])
def test_points_go_where_itk_takes_them(dims: int, tmp_path: Path) -> None:
    _, there = pair(dims, 7)
    path = write_displacement_field(there, there.affine, tmp_path / "there.nii.gz")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    index = np.random.default_rng(0).uniform(1, np.array(there.shape[1:]) - 2, (50, dims))
    affine = field_affine(there).numpy()
    points = index @ affine[:dims, :dims].T + affine[:dims, dims]
    theirs = np.array([transform.TransformPoint((lps(dims) * point).tolist()) for point in points]) * lps(dims)
    ours = map_points(torch.from_numpy(points), [there]).numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - points).max() > 0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_a_sampled_chain_moves_voxels_as_its_steps_do(dims: int) -> None:
    moving, there = pair(dims, 3)
    affine = random_affine(dims, 1)
    chain = sample_transform([affine, there, affine], moving.affine, moving.shape[1:])
    index = np.stack(np.meshgrid(*[np.arange(n) for n in moving.shape[1:]], indexing="ij")).reshape(dims, -1)
    grid_affine = field_affine(moving)
    points = torch.from_numpy(index.T).double() @ grid_affine[:dims, :dims].T + grid_affine[:dims, dims]
    expected = map_points(map_points(map_points(points, [affine]), [there]), [affine])
    found = points + chain.as_tensor().flatten(1).T.double() @ grid_affine[:dims, :dims].T
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dims", [2, 3])
def test_the_inverse_brings_points_back(dims: int, seed: int) -> None:
    moving, there = pair(dims, seed)
    there = sample_transform([0.5 * there, random_affine(dims, seed)], there.affine, there.shape[1:])
    back = invert_field(there, moving.affine, moving.shape[1:])
    # At the voxels of the inverse nothing is interpolated: there and back again is exact up to where iteration stops.
    matrix = field_affine(back)
    index = torch.from_numpy(np.indices(back.shape[1:]).reshape(dims, -1).T).double()
    points = index @ matrix[:dims, :dims].T + matrix[:dims, dims]
    start = map_points(points, [back])
    starts_at = apply_affine(torch.linalg.inv(field_affine(there)), start.T).T
    inside = ((starts_at >= 0) & (starts_at <= torch.tensor(there.shape[1:]) - 1)).all(dim=1)  # both sides extrapolate
    miss = (map_points(start, [there]) - points)[inside].norm(dim=1)
    assert inside.sum() > 50 and (start - points).norm(dim=1).mean() > 2
    assert miss.max() < 0.01


@pytest.mark.parametrize("dims", [2, 3])
def test_far_from_the_origin_of_the_world_positions_stay_exact(dims: int) -> None:
    """Meters away, on oblique, anisotropic grids, within 1e-4 mm of an evaluation on the whole grid by scipy."""
    shape, far = SHAPES[dims][1], [4321.0, -7654.0, 2987.0][:dims]
    there = field(shape, centered(grid(dims, 3, spacing=[0.7, 1.3, 3.1][:dims]), shape, far), strength=3.0)
    moving = centered(grid(dims, 8, spacing=[1.9, 0.6, 0.9][:dims]), SHAPES[dims][0], far)
    chain = sample_transform([there], moving, SHAPES[dims][0])
    at = np.indices(SHAPES[dims][0]).reshape(dims, -1)
    to_fixed = np.linalg.inv(field_affine(there).numpy()) @ field_affine(chain).numpy()
    index = to_fixed[:dims, :dims] @ at + to_fixed[:dims, dims:]
    moved = [map_coordinates(part.numpy().astype(np.float64), index, order=1, mode="nearest") for part in there]
    expected = field_affine(there).numpy()[:dims, :dims] @ np.stack(moved)
    found = field_affine(chain).numpy()[:dims, :dims] @ chain.as_tensor().double().flatten(1).numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected).max() > 2.0


MEMORY = """
import resource, sys
import torch
from equireg.io import write_displacement_field
from equireg.evaluation import regularity
from equireg.world import as_field, best_affine, invert_field, warp_image

def run(shape):
    steps = torch.linspace(0, 6, shape[1])[:, None].sin().expand(shape[0], shape[1], shape[2])
    there = as_field(torch.stack([2 * steps, steps, -steps]), torch.eye(4))
    affine = torch.diag(torch.tensor([1.1, 1.0, 0.9, 1.0]))
    back = invert_field(there, affine, shape)
    warp_image(back, there)
    regularity(there), best_affine(there, torch.ones(shape))
    write_displacement_field(back, affine, sys.argv[1])

torch.set_num_threads(2)
run((40, 40, 40))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run((128, 112, 96))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (3 * 4 * 128 * 112 * 96))
"""


def test_memory_is_that_of_the_results(tmp_path: Path) -> None:
    """Field, inverse and what is warped are three of the fields in which memory is counted here."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "back.nii")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6.0


@pytest.mark.parametrize("angle", [45.0, 90.0, 170.0])
def test_large_rotations_and_scalings_are_inverted_exactly(angle: float) -> None:
    t = np.deg2rad(angle)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = 1.7 * torch.tensor([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    turn[:3, 3] = torch.tensor([5.0, -3.0, 2.0])
    there = sample_transform([turn], torch.eye(4), (9, 8, 7))
    back = invert_field(there, torch.diag(torch.tensor([0.5, 2.0, 1.0, 1.0])), (11, 5, 6))
    expected = sample_transform([affine_inverse(turn)], back.affine, back.shape[1:])
    assert (back - expected).abs().max() < 1e-4


def test_folded_fields_give_a_finite_inverse() -> None:
    there = field((20, 20), np.eye(4), seed=0, strength=12.0)
    assert torch.isfinite(invert_field(there, np.eye(4), (20, 20))).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_transforms_are_inverted_whatever_their_steps(dims: int) -> None:
    _, there = pair(dims, 5)
    affine = random_affine(dims, 2)
    assert torch.allclose(
        invert_transform([affine, affine], np.eye(4), (4,) * dims)[0], affine_inverse(affine @ affine)
    )
    matrix = field_affine(there)
    middle = matrix @ torch.tensor([*((n - 1) / 2 for n in there.shape[1:]), 1.0], dtype=torch.float64)
    start = map_points(middle[None, :dims], [affine_inverse(affine)])  # the affine leads to the middle of the field
    around = centered(np.eye(4), (9,) * dims, map_points(start, [affine, there, affine])[0].numpy())
    (back,) = invert_transform([affine, there, affine], around, (9,) * dims)
    assert (map_points(map_points(start, [affine, there, affine]), [back]) - start).norm() < 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_the_best_affine_is_the_affine_that_was_there(dims: int) -> None:
    affine = random_affine(dims, 4)
    there = sample_transform([affine], grid(dims, 1), SHAPES[dims][0])
    assert (best_affine(there) - affine).abs().max() < 1e-5
    mask = torch.zeros(there.shape[1:], dtype=torch.bool)
    mask[4:9, 5:11] = True
    disturbed = there.clone()
    disturbed[:, ~mask] += 50.0
    assert (best_affine(disturbed, mask) - affine).abs().max() < 1e-5
    assert (best_affine(disturbed) - affine).abs().max() > 0.1


def test_what_voxels_do_not_tell_stays_a_translation() -> None:
    slice_of = sample_transform([random_affine(3, 0)], np.eye(4), (6, 7, 1))
    assert (best_affine(slice_of)[:3, 2] - torch.tensor([0.0, 0.0, 1.0])).abs().max() < 1e-6
    single = sample_transform([random_affine(2, 0)], np.eye(4), (1, 1))
    assert torch.equal(best_affine(single)[:2, :2], torch.eye(2, dtype=torch.float64))


def test_a_split_field_is_the_field() -> None:
    _, there = pair(3, 2)
    there = sample_transform([there, random_affine(3, 8)], there.affine, there.shape[1:])
    rest, affine = split_affine(there, best_affine(there))
    again = sample_transform([rest, affine], there.affine, there.shape[1:])
    assert (again - there).abs().max() < 1e-4
    assert rest.abs().mean() < 0.7 * there.abs().mean()


def test_index_displacements_warp_arrays() -> None:
    moving, there = pair(3, 6)
    ours = warp(moving.as_tensor()[None], index_displacement(there, moving)[None], padding="zeros")[0]
    inside = well_inside(moving, there)
    assert (ours - warp_image(moving, there)).abs()[0][inside].max() < 1e-2


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moving, there = pair(3, 1)
    whole = (warp_image(moving, there), sample_transform([there], moving.affine, moving.shape[1:]))
    inverse = invert_field(there, moving.affine, moving.shape[1:], tolerance=0.0)
    monkeypatch.setattr(blocks, "_VOXELS", 400)
    assert torch.equal(whole[0], warp_image(moving, there))
    assert torch.equal(whole[1], sample_transform([there], moving.affine, moving.shape[1:]))
    assert torch.equal(inverse, invert_field(there, moving.affine, moving.shape[1:], tolerance=0.0))


def test_labels_keep_type_and_values_and_background_fills_the_outside() -> None:
    label = MetaTensor(torch.tensor([[[2**40 + 1, 7], [3, 9]]]), affine=torch.eye(4))
    shift = as_field(torch.stack([torch.ones(2, 2), torch.zeros(2, 2)]), torch.eye(4))
    assert warp_image(label, shift, "nearest").tolist() == [[[3, 9], [0, 0]]]
    moved = warp_image(label.float(), shift, background=-1024.0)
    assert moved.tolist() == [[[3.0, 9.0], [-1024.0, -1024.0]]]
    assert label.tolist() == [[[2**40 + 1, 7], [3, 9]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_field(torch.zeros(3, 4, 4), torch.eye(4)), r"\(D, \*shape\)"),
        (lambda: field_affine(torch.zeros(2, 4, 4)), "MetaTensor"),
        (lambda: map_points(torch.zeros(1, 3), [torch.eye(3)]), "3D points"),
        (lambda: map_points(torch.zeros(1, 2), [torch.zeros(3, 3)]), "positive spacing"),
        (lambda: warp_image(image((4, 4), np.eye(4)), field((4, 4, 4), np.eye(4))), "as many axes"),
        (lambda: warp_image(image((4, 4), np.eye(4)).long(), field((4, 4), np.eye(4))), "floating point"),
        (lambda: best_affine(field((4, 4), np.eye(4)), torch.ones(3, 3)), "mask of shape"),
        (lambda: affine_inverse(torch.zeros(4, 4)), "positive spacing"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_arguments_are_left_alone() -> None:
    moving, there = pair(2, 0)
    before = moving.clone(), there.clone(), moving.affine.clone()
    warp_image(moving, there)
    invert_field(there, moving.affine, moving.shape[1:])
    assert torch.equal(before[0], moving) and torch.equal(before[1], there) and torch.equal(before[2], moving.affine)
    assert smooth((4, 4), 0).shape == (1, 4, 4)
