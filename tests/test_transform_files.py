"""Transform files, with SimpleITK and ITK as the judges of what points do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates

from equireg.transform_files import read_affine, read_transform, write_affine, write_transform

itk = pytest.importorskip("itk")
sitk = pytest.importorskip("SimpleITK")


def rotation(*degrees: float) -> np.ndarray:
    """Turn about x, y and z in this order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def make_affine(direction: np.ndarray, spacing: Sequence[float], origin: Sequence[float]) -> np.ndarray:
    dims = len(spacing)
    affine = np.eye(4)
    affine[:dims, :dims] = direction[:dims, :dims] @ np.diag(spacing)
    affine[:dims, 3] = origin
    return affine


OBLIQUE = rotation(25, -10, 40)
GRIDS = {
    "RAS": make_affine(np.eye(3), (1, 1, 1), (-5, 3, 8)),
    "LPS, anisotropic": make_affine(np.diag([-1, -1, 1]), (0.8, 0.9, 2.5), (4, -3, 8)),
    "oblique, anisotropic": make_affine(OBLIQUE, (0.7, 1.3, 3), (-31, 17, 90)),
    "oblique, left-handed, axes permuted": make_affine(
        OBLIQUE[:, [2, 0, 1]] @ np.diag([1, -1, 1]), (2, 1, 0.5), (9, 1, -7)
    ),
    "2D": make_affine(np.eye(2), (1, 1), (5, -7)),
    "2D oblique, anisotropic": make_affine(rotation(0, 0, 30), (0.6, 1.7), (-12, 30)),
    "2D flipped": make_affine(np.diag([-1, 1, 1]), (2, 0.5), (7, -3)),
}
SHAPES = {2: (15, 11), 3: (13, 10, 9)}


def grid_dims(name: str) -> int:
    return 2 if name.startswith("2D") else 3


def small(affine: np.ndarray, dims: int) -> np.ndarray:
    """Return the part of a `(4, 4)` affine that counts for a grid of D axes."""
    keep = [*range(dims), 3]
    return affine[np.ix_(keep, keep)]


def random_field(name: str) -> MetaTensor:
    dims = grid_dims(name)
    return MetaTensor(torch.rand(dims, *SHAPES[dims]) - 0.5, affine=torch.from_numpy(GRIDS[name]))


def random_affine(name: str) -> torch.Tensor:
    """Return an affine, RAS+ millimeters, that moves the middle of a grid by about a voxel."""
    dims = grid_dims(name)
    grid = torch.from_numpy(small(GRIDS[name], dims))
    center = grid @ torch.tensor([*(np.array(SHAPES[dims]) / 2), 1.0])
    there, back = torch.eye(dims + 1).double(), torch.eye(dims + 1).double()
    there[:, dims], back[:dims, dims] = center, -center[:dims]
    turn = torch.eye(dims + 1).double()
    turn[:dims, :dims] += 0.1 * (torch.rand(dims, dims) - 0.5)
    turn[:dims, dims] = torch.rand(dims) - 0.5
    return there @ turn @ back


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def map_points(points: np.ndarray, steps: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Take points, RAS+ millimeters, through steps; and tell which of them never left the grid of a field."""
    inside = np.ones(len(points), dtype=bool)
    for step in steps:
        if not isinstance(step, MetaTensor):
            points = apply(step.numpy(), points)
            continue
        dims = step.shape[0]
        grid = small(step.affine.numpy(), dims)
        index = apply(np.linalg.inv(grid), points)
        inside &= ((index > 0.01) & (index < np.array(step.shape[1:]) - 1.01)).all(axis=1)
        moved = [map_coordinates(c, index.T, order=1, mode="nearest") for c in step.numpy().astype(np.float64)]
        points = apply(grid, index + np.stack(moved, axis=1))
    return points, inside


def assert_moves_alike(transform: Any, steps: Sequence[torch.Tensor], name: str, tolerance: float) -> None:
    """Compare a transform of ITK or SimpleITK, LPS+, with steps, RAS+, at random points in a grid."""
    dims = grid_dims(name)
    index = np.random.default_rng(3).uniform(1, np.array(SHAPES[dims]) - 2, size=(200, dims))
    points = apply(small(GRIDS[name], dims), index)
    flip = np.array([-1.0, -1.0, 1.0])[:dims]
    theirs = flip * np.array([list(transform.TransformPoint(point.tolist())) for point in flip * points])
    ours, inside = map_points(points, steps)
    assert inside.mean() > 0.5
    assert np.abs(theirs - points).max() > 0.05  # a transform that does nothing proves nothing
    assert np.abs(theirs - ours)[inside].max() < tolerance


def sitk_field(name: str) -> Any:
    """Return a displacement field as a SimpleITK image, made without our code: LPS+ millimeters, double."""
    dims = grid_dims(name)
    lps = np.diag([-1.0, -1.0, 1.0][:dims] + [1.0]) @ small(GRIDS[name], dims)
    spacing = np.linalg.norm(lps[:dims, :dims], axis=0)
    values = np.random.default_rng(4).uniform(-0.5, 0.5, size=(*SHAPES[dims][::-1], dims)) * spacing.min()
    image = sitk.GetImageFromArray(values, isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:dims, dims].tolist())
    image.SetDirection((lps[:dims, :dims] / spacing).ravel().tolist())
    return image


def linear_transforms() -> dict[str, Callable[[], Any]]:
    center, shift, axis = (10.0, -20.0, 30.0), (1.0, -2.0, 3.0), (0.0, 0.6, 0.8)
    matrix = (np.eye(3) + 0.1 * np.arange(9).reshape(3, 3)).ravel().tolist()
    matrix_2d = [1.1, 0.2, -0.3, 0.9]
    return {
        "translation": lambda: sitk.TranslationTransform(3, shift),
        "scale": lambda: sitk.ScaleTransform(3, (1.1, 0.9, 1.3)),
        "Euler": lambda: sitk.Euler3DTransform(center, 0.1, -0.2, 0.3, shift),
        "Euler ZYX": lambda: _with_zyx(sitk.Euler3DTransform(center, 0.1, -0.2, 0.3, shift)),
        "versor": lambda: sitk.VersorTransform(axis, 0.4, center),
        "versor rigid": lambda: sitk.VersorRigid3DTransform(axis, 0.4, shift, center),
        "similarity": lambda: sitk.Similarity3DTransform(1.2, axis, 0.4, shift, center),
        "scale versor": lambda: sitk.ScaleVersor3DTransform((1.1, 0.9, 1.2), axis, 0.4, shift, center),
        "scale skew versor": lambda: sitk.ScaleSkewVersor3DTransform(
            (1.1, 0.9, 1.2), (0.1, 0.02, 0.03, 0.04, 0.05, 0.06), axis, 0.4, shift, center
        ),
        "affine": lambda: sitk.AffineTransform(matrix, shift, center),
        "2D translation": lambda: sitk.TranslationTransform(2, shift[:2]),
        "2D Euler": lambda: sitk.Euler2DTransform(center[:2], 0.3, shift[:2]),
        "2D similarity": lambda: sitk.Similarity2DTransform(1.2, 0.3, shift[:2], center[:2]),
        "2D affine": lambda: sitk.AffineTransform(matrix_2d, shift[:2], center[:2]),
    }


def _with_zyx(transform: Any) -> Any:
    transform.SetComputeZYX(True)
    return transform


@pytest.mark.parametrize("kind", linear_transforms())
@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat", ".h5", ".hdf5"])
def test_linear_transforms_of_all_kinds_are_read(kind: str, suffix: str, tmp_path: Path) -> None:
    transform = linear_transforms()[kind]()
    path = tmp_path / f"linear{suffix}"
    sitk.WriteTransform(transform, str(path))
    (step,) = read_transform(path)
    assert type(step) is torch.Tensor and step.dtype == torch.float64
    assert step.shape == (transform.GetDimension() + 1,) * 2
    name = "2D oblique, anisotropic" if transform.GetDimension() == 2 else "oblique, anisotropic"
    assert_moves_alike(transform, [step], name, tolerance=1e-9)
    assert torch.equal(read_affine(path), step)


@pytest.mark.parametrize("dims", [2, 3])
def test_identity_is_read(dims: int, tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.Transform(dims, sitk.sitkIdentity), str(tmp_path / "identity.tfm"))
    assert torch.equal(read_affine(tmp_path / "identity.tfm"), torch.eye(dims + 1, dtype=torch.float64))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("precision, tolerance", [("F", 1e-4), ("D", 1e-9)])
@pytest.mark.parametrize("kind", ["AffineTransform", "MatrixOffsetTransformBase"])
def test_affines_of_ants_are_read(dims: int, precision: str, tolerance: float, kind: str, tmp_path: Path) -> None:
    """`0GenericAffine.mat` is written by programs of single or double precision, with a center of rotation."""
    itk_type = getattr(itk, precision)
    key = (itk_type, dims) if kind == "AffineTransform" else (itk_type, dims, dims)
    transform = getattr(itk, kind)[key].New()
    transform.SetCenter([10.0, -20.0, 30.0][:dims])
    transform.SetMatrix(itk.matrix_from_array((np.eye(dims) + 0.1).astype("f4" if precision == "F" else "f8")))
    transform.SetTranslation([1.0, -2.0, 3.0][:dims])
    writer = itk.TransformFileWriterTemplate[itk_type].New()
    writer.SetFileName(str(tmp_path / "0GenericAffine.mat"))
    writer.SetInput(transform)
    writer.Update()
    name = "2D oblique, anisotropic" if dims == 2 else "oblique, anisotropic"
    assert_moves_alike(transform, read_transform(tmp_path / "0GenericAffine.mat"), name, tolerance)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nii.gz"])
@pytest.mark.parametrize("pixel", ["Float32", "Float64"])
def test_images_of_displacements_are_read(name: str, suffix: str, pixel: str, tmp_path: Path) -> None:
    image = sitk_field(name)
    sitk.WriteImage(sitk.Cast(image, getattr(sitk, f"sitkVector{pixel}")), str(tmp_path / f"field{suffix}"))
    (field,) = read_transform(tmp_path / f"field{suffix}")
    dims = grid_dims(name)
    assert isinstance(field, MetaTensor) and field.shape == (dims, *SHAPES[dims])
    assert field.affine.shape == (4, 4) and field.affine.dtype == torch.float64
    np.testing.assert_allclose(field.affine, GRIDS[name], atol=1e-4 if suffix == ".nii.gz" else 1e-10)
    assert_moves_alike(sitk.DisplacementFieldTransform(image), [field], name, tolerance=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".tfm", ".h5", ".hdf5"])
def test_displacement_field_transforms_are_read(name: str, suffix: str, tmp_path: Path) -> None:
    transform = sitk.DisplacementFieldTransform(sitk_field(name))
    sitk.WriteTransform(transform, str(tmp_path / f"field{suffix}"))
    steps = read_transform(tmp_path / f"field{suffix}")
    assert len(steps) == 1 and isinstance(steps[0], MetaTensor)
    assert_moves_alike(transform, steps, name, tolerance=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
def test_composites_are_read_in_the_order_of_points(name: str, suffix: str, tmp_path: Path) -> None:
    dims = grid_dims(name)
    flip = np.diag([-1.0, -1.0, 1.0][:dims] + [1.0])
    lps = flip @ random_affine(name).numpy() @ flip
    affine = sitk.AffineTransform(lps[:dims, :dims].ravel().tolist(), lps[:dims, dims].tolist())
    scale = sitk.ScaleTransform(dims, [1.05] * dims)
    scale.SetCenter((flip @ small(GRIDS[name], dims))[:dims, dims].tolist())
    composite = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(sitk_field(name)), scale])
    sitk.WriteTransform(composite, str(tmp_path / f"composite{suffix}"))
    steps = read_transform(tmp_path / f"composite{suffix}")
    assert [step.dim() for step in steps] == [2, dims + 1, 2]  # points meet the scaling, added last, first
    assert steps[0][0, 0] == pytest.approx(1.05, abs=1e-9)
    assert_moves_alike(composite, steps, name, tolerance=1e-5)


def itk_affine(dims: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    affine = itk.AffineTransform[itk.D, dims].New()
    affine.SetMatrix(itk.matrix_from_array(np.eye(dims) + 0.2 * rng.normal(size=(dims, dims))))
    affine.SetTranslation(rng.normal(size=dims).tolist())
    return affine


@pytest.mark.parametrize("dims", [2, 3])
def test_nested_composites_are_flattened(dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ITK holds them, though its files cannot."""
    inner, outer = (itk.CompositeTransform[itk.D, dims].New() for _ in range(2))
    for seed in (1, 2):
        inner.AddTransform(itk_affine(dims, seed))
    for transform in (itk_affine(dims, 3), inner, itk_affine(dims, 4)):
        outer.AddTransform(transform)
    path = write_affine(torch.eye(dims + 1), tmp_path / "any.tfm")
    monkeypatch.setattr(itk, "transformread", lambda *args, **kwargs: [outer])
    steps = read_transform(path)
    assert len(steps) == 4
    name = "2D oblique, anisotropic" if dims == 2 else "oblique, anisotropic"
    assert_moves_alike(outer, steps, name, tolerance=1e-9)
    assert_moves_alike(outer, [read_affine(path)], name, tolerance=1e-9)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_itk_and_simpleitk_read_composites_we_write(name: str, suffix: str, tmp_path: Path) -> None:
    steps = [random_affine(name), random_field(name), random_affine(name), random_field(name)]
    kept = [step.clone() for step in steps]
    path = write_transform(steps, tmp_path / f"composite{suffix}")
    assert path == tmp_path / f"composite{suffix}" and list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(step, before) for step, before in zip(steps, kept, strict=True))
    assert_moves_alike(sitk.ReadTransform(str(path)), steps, name, tolerance=1e-9)
    (theirs,) = itk.transformread(str(path))
    assert_moves_alike(theirs, steps, name, tolerance=1e-9)
    for again, step in zip(read_transform(path), steps, strict=True):
        torch.testing.assert_close(again, step, atol=1e-6, rtol=0, check_dtype=True)
        if isinstance(step, MetaTensor):
            torch.testing.assert_close(again.affine, step.affine, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".h5"])
def test_one_field_is_written(name: str, suffix: str, tmp_path: Path) -> None:
    field = random_field(name)
    path = write_transform([field], tmp_path / f"field{suffix}")
    if suffix == ".h5":
        theirs = sitk.ReadTransform(str(path))
        assert theirs.GetName() == "DisplacementFieldTransform"
    else:
        theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    assert_moves_alike(theirs, [field], name, tolerance=1e-9 if suffix == ".h5" else 1e-4)  # NIfTI grids are float32
    assert_moves_alike(theirs, read_transform(path), name, tolerance=1e-5)


@pytest.mark.parametrize("name", ["oblique, anisotropic", "2D oblique, anisotropic"])
@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5", ".hdf5"])
def test_affines_are_written(name: str, suffix: str, tmp_path: Path) -> None:
    affine = random_affine(name)
    path = write_affine(affine, tmp_path / f"affine{suffix}")
    theirs = sitk.ReadTransform(str(path))
    assert theirs.GetName() == "AffineTransform" and list(tmp_path.iterdir()) == [path]
    assert_moves_alike(theirs, [affine], name, tolerance=1e-9)
    torch.testing.assert_close(read_affine(path), affine, atol=1e-11, rtol=0)


def test_a_millimeter_to_the_right_is_minus_one_in_the_file(tmp_path: Path) -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    theirs = sitk.ReadTransform(str(write_affine(affine, tmp_path / "shift.tfm")))
    assert theirs.TransformPoint((0.0, 0.0, 0.0)) == (-1.0, -2.0, 3.0)


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
def test_affines_that_follow_each_other_are_multiplied(suffix: str, tmp_path: Path) -> None:
    first, second = random_affine("RAS"), random_affine("LPS, anisotropic")
    path = write_transform([first, second], tmp_path / f"two{suffix}")
    assert len(read_transform(path)) == 2
    torch.testing.assert_close(read_affine(path), second @ first, atol=1e-10, rtol=0)
    assert not torch.allclose(first @ second, second @ first, atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii.gz", ".h5"])
def test_a_field_is_no_affine(suffix: str, tmp_path: Path) -> None:
    path = write_transform([random_field("RAS")], tmp_path / f"field{suffix}")
    with pytest.raises(ValueError, match=f"field{suffix}.* holds a displacement field"):
        read_affine(path)


def bspline(dims: int) -> Any:
    transform = sitk.BSplineTransform(dims, 3)
    transform.SetTransformDomainMeshSize([2] * dims)
    return transform


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("alone", [True, False])
def test_other_transforms_are_refused_by_name(dims: int, alone: bool, tmp_path: Path) -> None:
    transform = bspline(dims)
    if not alone:
        transform = sitk.CompositeTransform([sitk.TranslationTransform(dims), transform])
    sitk.WriteTransform(transform, str(tmp_path / "spline.h5"))
    for read in (read_transform, read_affine):
        with pytest.raises(ValueError, match="spline.h5' holds a BSplineTransform"):
            read(tmp_path / "spline.h5")


def test_several_transforms_without_an_order_are_refused(tmp_path: Path) -> None:
    itk.transformwrite([itk_affine(3, 1), itk_affine(3, 2)], str(tmp_path / "two.tfm"))
    with pytest.raises(ValueError, match="two.tfm' should hold one transform, got 2"):
        read_transform(tmp_path / "two.tfm")


def test_images_are_no_displacements(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkFloat32), str(tmp_path / "scalar.mha"))
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorFloat32, 2), str(tmp_path / "flat.nrrd"))
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkFloat32), str(tmp_path / "scalar.nii.gz"))
    for name in ("scalar.mha", "flat.nrrd", "scalar.nii.gz"):
        with pytest.raises(ValueError, match=name):
            read_transform(tmp_path / name)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".tfm", ".txt", ".h5", ".hdf5", ".xfm"])
@pytest.mark.parametrize("content", [None, b"", b"no transform\n" * 40, bytes(range(256)) * 4], ids=str)
def test_what_is_no_transform_is_one_error(suffix: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}"):
        read_transform(path)


def cut_short(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


@pytest.mark.parametrize("suffix", [".h5", ".nrrd", ".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_field_cut_short_is_one_error(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"field{suffix}"
    if suffix == ".h5":
        write_transform([random_field("RAS")], path)
    else:
        sitk.WriteImage(sitk.Cast(sitk_field("RAS"), sitk.sitkVectorFloat32), str(path))
    with pytest.raises(ValueError, match=f"field{suffix}"):
        read_transform(cut_short(path, share))


def test_a_folder_or_another_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    for name in ("folder.h5", "image.png", "noext", ".h5"):
        with pytest.raises(ValueError, match=name):
            read_transform(tmp_path / name)


AFFINE, FIELD = torch.eye(4, dtype=torch.float64), MetaTensor(torch.zeros(3, 4, 5, 6), affine=torch.eye(4))
SHEARED = torch.eye(4)
SHEARED[0, 1] = 0.2
BAD = {
    "no step": ([], "t.h5", "at least one step"),
    "suffix": ([AFFINE], "t.nrrd", "t.nrrd"),
    "no folder": ([AFFINE], "missing/t.h5", "folder that exists"),
    "affine as NIfTI": ([AFFINE], "t.nii.gz", "one displacement field"),
    "two fields as NIfTI": ([FIELD, FIELD], "t.nii", "one displacement field"),
    "field and affine as NIfTI": ([FIELD, AFFINE], "t.nii", "one displacement field"),
    "field as text": ([FIELD], "t.tfm", r"\.h5"),
    "field as MATLAB": ([AFFINE, FIELD], "t.mat", r"\.h5"),
    "sheared grid": ([MetaTensor(torch.zeros(3, 4, 5, 6), affine=SHEARED)], "t.h5", "orthogonal"),
    "singular affine": ([torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))], "t.tfm", "affine"),
    "NaN affine": ([torch.full((4, 4), torch.nan)], "t.tfm", "affine"),
    "affine of 4 axes": ([torch.eye(5)], "t.tfm", "affine"),
    "ddf without a grid": ([torch.zeros(3, 4, 5, 6)], "t.h5", "affine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_no_file(case: str, tmp_path: Path) -> None:
    steps, name, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        write_transform(steps, tmp_path / name)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5", ".nii.gz"])
def test_failure_leaves_the_old_file_and_no_other(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FIELD if suffix == ".nii.gz" else AFFINE
    path = write_transform([step], tmp_path / f"old{suffix}")
    before = path.read_bytes()

    def full_disk(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=f"No space left on device.*old{suffix}"):
        write_transform([step], path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_folder_that_refuses_writing_is_named_in_the_error() -> None:
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("needs a folder in which nobody may create files")
    for name in ("t.tfm", "t.mat", "t.h5"):
        with pytest.raises(OSError, match=f"cannot write the transform.*{folder / name}"):
            write_affine(AFFINE, folder / name)


def test_without_itk_only_nifti_fields_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_affine(AFFINE, tmp_path / "t.tfm")
    monkeypatch.setitem(sys.modules, "itk", None)
    (field,) = read_transform(write_transform([FIELD], tmp_path / "t.nii.gz"))
    assert torch.equal(field.as_tensor(), FIELD.as_tensor())
    for call in (lambda: read_transform(path), lambda: write_transform([FIELD], tmp_path / "t.h5")):
        with pytest.raises(ImportError, match="pip install itk"):
            call()


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat"])
@pytest.mark.parametrize("field", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_text_and_matlab_files_cut_short_are_one_error(suffix: str, field: bool, share: float, tmp_path: Path) -> None:
    """ITK takes some of them for whole, and never returns from others."""
    transform = sitk.DisplacementFieldTransform(sitk_field("RAS")) if field else linear_transforms()["affine"]()
    sitk.WriteTransform(transform, str(tmp_path / f"short{suffix}"))
    with pytest.raises(ValueError, match=f"short{suffix}.*ends early"):
        read_transform(cut_short(tmp_path / f"short{suffix}", share))


@pytest.mark.parametrize("content", [b"", b"no transform\n" * 40, bytes(range(256)) * 4, bytes(200)], ids=str)
def test_what_is_no_matlab_file_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.mat").write_bytes(content)
    with pytest.raises(ValueError, match="broken.mat"):
        read_transform(tmp_path / "broken.mat")


def test_a_composite_of_nothing_is_the_identity(tmp_path: Path) -> None:
    itk.transformwrite([itk.CompositeTransform[itk.D, 2].New()], str(tmp_path / "empty.h5"))
    assert torch.equal(read_affine(tmp_path / "empty.h5"), torch.eye(3, dtype=torch.float64))


def test_fields_that_smooth_their_updates_are_read(tmp_path: Path) -> None:
    """SyN of ANTs works with these; they move points as other displacement fields do."""
    (plain,) = itk.transformread(str(write_transform([random_field("RAS")], tmp_path / "plain.h5")))
    smooth = itk.GaussianSmoothingOnUpdateDisplacementFieldTransform[itk.D, 3].New()
    smooth.SetDisplacementField(plain.GetDisplacementField())
    itk.transformwrite([smooth], str(tmp_path / "smooth.h5"))
    assert_moves_alike(smooth, read_transform(tmp_path / "smooth.h5"), "RAS", tolerance=1e-5)


def test_fields_that_require_gradients_are_written(tmp_path: Path) -> None:
    field = random_field("RAS")
    path = write_transform([MetaTensor(field.as_tensor().requires_grad_(), affine=field.affine)], tmp_path / "t.h5")
    assert_moves_alike(sitk.ReadTransform(str(path)), [field], "RAS", tolerance=1e-9)


PROJECTIVE = torch.eye(4)
PROJECTIVE[3, 0] = 0.5
WORSE = {
    "composite as MATLAB": ([AFFINE, AFFINE], "t.mat", "one affine"),
    "2D and 3D": ([AFFINE, torch.eye(3)], "t.h5", r"one number of axes, got \[2, 3\]"),
    "projective": ([PROJECTIVE], "t.tfm", "last row"),
    "NaN field": ([MetaTensor(torch.full((3, 4, 5, 6), torch.nan), affine=torch.eye(4))], "t.h5", "finite"),
    "3 components in 2D": ([MetaTensor(torch.zeros(3, 4, 5), affine=torch.eye(4))], "t.h5", r"got \[3, 4, 5\]"),
}


@pytest.mark.parametrize("case", WORSE)
def test_what_itk_would_accept_or_garble_is_refused(case: str, tmp_path: Path) -> None:
    steps, name, message = WORSE[case]
    with pytest.raises(ValueError, match=message):
        write_transform(steps, tmp_path / name)
    assert list(tmp_path.rglob("*")) == []


FULL_DISK = """
import resource, signal, sys
import torch
from equireg.transform_files import write_affine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name in sys.argv[1:]:
    write_affine(torch.eye(4), name)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for name in sys.argv[1:]:
    try:
        write_affine(torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])), name)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_full_disk_is_noticed(tmp_path: Path) -> None:
    """ITK itself writes the first bytes of these files, and reports success."""
    pytest.importorskip("resource")
    paths = [tmp_path / "t.mat", tmp_path / "t.tfm"]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert "cannot write the transform" in line and str(path) in line
        assert torch.equal(read_affine(path), torch.eye(4, dtype=torch.float64))
    assert sorted(tmp_path.iterdir()) == paths
