"""Displacement field files, with SimpleITK as the judge of geometry."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from equireg import fields
from equireg.io import SaveTransformd, read_displacement_field, write_displacement_field
from equireg.lists import result_name
from equireg.transforms import WarpImaged

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


def make_affine(direction: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    dims = len(spacing)
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = direction[:dims, :dims] @ np.diag(spacing)
    affine[:dims, dims] = origin
    return affine


OBLIQUE = rotation(25, -10, 40)
GRIDS = {
    "RAS": make_affine(np.eye(3), (1, 1, 1), (-5, 3, 8)),
    "LAS": make_affine(np.diag([-1, 1, 1]), (2, 1, 1), (40, -3, 8)),
    "LPS": make_affine(np.diag([-1, -1, 1]), (0.8, 0.9, 2.5), (4, -3, 8)),
    "oblique": make_affine(OBLIQUE, (0.7, 1.3, 3), (-31, 17, 90)),
    "oblique left-handed, axes permuted": make_affine(
        OBLIQUE[:, [2, 0, 1]] @ np.diag([1, -1, 1]), (2, 1, 0.5), (9, 1, -7)
    ),
    "2D": make_affine(np.eye(2), (1, 1), (5, -7)),
    "2D oblique, anisotropic": make_affine(rotation(0, 0, 30), (0.6, 1.7), (-12, 30)),
    "2D flipped, 4x4": np.array([[-2.0, 0, 0, 7], [0, 0.5, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1]]),
}
SHAPES = {2: (15, 11), 3: (13, 10, 9)}


def grid_dims(name: str) -> int:
    return 2 if name.startswith("2D") else 3


def write_image(image: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    """Write a scalar image with a `(D+1, D+1)` or `(4, 4)` affine through nibabel alone."""
    full, last = np.eye(4), len(affine) - 1
    full[:last, :last], full[:last, 3] = affine[:last, :last], affine[:last, last]
    nib.save(nib.Nifti1Image(image.astype(np.float32), full), path)
    return path


def resample_with_file(image: Path, field: Path) -> np.ndarray:
    """Resample an image through a displacement field file with SimpleITK, array axes as in NIfTI."""
    moving = sitk.ReadImage(str(image), sitk.sitkFloat64)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    return sitk.GetArrayFromImage(sitk.Resample(moving, moving, transform, sitk.sitkLinear, -1.0)).T


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_simpleitk_resamples_as_warp_does(name: str, suffix: str, tmp_path: Path) -> None:
    shape, affine = SHAPES[grid_dims(name)], GRIDS[name]
    image = torch.rand(1, 1, *shape)
    ddf = 2.0 * torch.randn(1, len(shape), *shape)
    field = write_displacement_field(ddf[0], affine, tmp_path / f"ddf{suffix}")
    theirs = resample_with_file(write_image(image[0, 0].numpy(), affine, tmp_path / "image.nii"), field)
    ours = fields.warp(image, ddf)[0, 0].numpy()
    target = (fields.identity_grid(list(shape)) + ddf)[0]
    last = torch.tensor(shape).reshape(-1, *[1] * len(shape)) - 1
    inside = ((target > 0.01) & (target < last - 0.01)).all(dim=0).numpy()  # outside, ITK answers its default value
    assert inside.mean() > 0.3
    assert np.abs(theirs - ours)[inside].max() < 1e-4


@pytest.mark.parametrize("name", GRIDS)
def test_what_was_written_is_read(name: str, tmp_path: Path) -> None:
    shape = SHAPES[grid_dims(name)]
    ddf = 5 * torch.randn(len(shape), *shape)
    kept = ddf.clone()
    again, affine = read_displacement_field(write_displacement_field(ddf, GRIDS[name], tmp_path / "ddf.nii.gz"))
    torch.testing.assert_close(again, ddf, atol=1e-5, rtol=1e-6)
    last = len(GRIDS[name]) - 1
    np.testing.assert_allclose(affine[:last, :last], GRIDS[name][:last, :last], atol=1e-6)
    np.testing.assert_allclose(affine[:last, 3], GRIDS[name][:last, last], atol=1e-5)
    assert affine.shape == (4, 4) and affine.dtype == torch.float64
    assert torch.equal(ddf, kept)


def test_one_millimeter_to_the_right_anterior_top(tmp_path: Path) -> None:
    """A step along +x, +y, +z of RAS is (-1, -1, 1) in the file, whatever the voxels look like."""
    affine = make_affine(np.diag([-1, 1, 1]), (2, 4, 0.5), (0, 0, 0))
    ddf = torch.tensor([-0.5, 0.25, 2.0]).reshape(3, 1, 1, 1).expand(3, 4, 5, 6)
    written = nib.load(write_displacement_field(ddf, affine, tmp_path / "ddf.nii"))
    assert written.shape == (4, 5, 6, 1, 3) and written.get_data_dtype() == np.float32
    assert int(written.header["intent_code"]) == 1007 and written.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(np.unique(written.get_fdata().reshape(-1, 3), axis=0), [[-1, -1, 1]])
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "ddf.nii"), sitk.sitkVectorFloat64))
    point = (2.0, -4.0, 1.0)  # LPS millimeters of voxel (1, 1, 2)
    assert transform.TransformPoint(point) == pytest.approx((1.0, -5.0, 2.0), abs=1e-6)


def test_shift_brings_the_moving_peak_to_the_fixed_one(tmp_path: Path) -> None:
    moving = np.zeros((7, 7, 7), dtype=np.float32)
    moving[4, 2, 3] = 1
    image = write_image(moving, GRIDS["LAS"], tmp_path / "moving.nii")
    ddf = torch.tensor([1.0, -1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 7, 7, 7)
    moved = resample_with_file(image, write_displacement_field(ddf, GRIDS["LAS"], tmp_path / "ddf.nii"))
    assert np.unravel_index(moved.argmax(), moved.shape) == (3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_any_real_type_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    ddf = torch.full((2, 3, 4), 2).to(dtype)
    again, _ = read_displacement_field(write_displacement_field(ddf, torch.eye(3), tmp_path / "ddf.nii"))
    assert again.unique().tolist() == [2.0]


@pytest.mark.parametrize("name", ["oblique", "2D oblique, anisotropic"])
def test_the_file_is_the_one_nibabel_would_write(name: str, tmp_path: Path) -> None:
    dims = grid_dims(name)
    ddf = 5 * torch.randn(dims, *SHAPES[dims][:-1], 67, generator=torch.Generator().manual_seed(0))
    ours = nib.load(write_displacement_field(ddf, GRIDS[name], tmp_path / "ours.nii"))
    steps = np.diag([-1.0, -1.0, 1.0])[:dims, :dims] @ GRIDS[name][:dims, :dims]
    field = np.einsum("ij,j...->...i", steps, ddf.double().numpy()).reshape(ours.shape).astype(np.float32)
    theirs = nib.Nifti1Image(field, ours.affine, ours.header)
    nib.save(theirs, tmp_path / "theirs.nii")
    assert (tmp_path / "ours.nii").read_bytes() == (tmp_path / "theirs.nii").read_bytes()


def test_microscopic_voxels_keep_their_grid(tmp_path: Path) -> None:
    affine = make_affine(OBLIQUE, (1e-4, 2e-4, 3e-4), (0, 0, 0))
    ddf = torch.randn(3, 4, 5, 6)
    again, grid = read_displacement_field(write_displacement_field(ddf, affine, tmp_path / "ddf.nii"))
    torch.testing.assert_close(again, ddf, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(grid, affine, atol=1e-10)


SHEAR = np.eye(4)
SHEAR[0, 1] = 0.2
GOOD = torch.zeros(3, 4, 4, 4)
BAD = {
    "batch axis": (GOOD[None], np.eye(4), "ddf.nii", r"shape \(1, 3, 4, 4, 4\)"),
    "components last": (torch.zeros(4, 4, 4, 3), np.eye(4), "ddf.nii", r"shape \(4, 4, 4, 3\)"),
    "2D components on a 3D grid": (torch.zeros(2, 4, 4, 4), np.eye(4), "ddf.nii", r"shape \(2, 4, 4, 4\)"),
    "empty": (torch.zeros(3, 4, 0, 4), np.eye(4), "ddf.nii", r"shape \(3, 4, 0, 4\)"),
    "NaN": (torch.full((3, 4, 4, 4), torch.nan), np.eye(4), "ddf.nii", "with NaN or infinity"),
    "affine shape": (GOOD, np.eye(3), "ddf.nii", r"shape \(4, 4\), got \(3, 3\)"),
    "zero affine": (GOOD, np.zeros((4, 4)), "ddf.nii", "invertible affine"),
    "singular affine": (GOOD, np.eye(4)[[0, 0, 2, 3]], "ddf.nii", "affine"),
    "NaN affine": (GOOD, np.full((4, 4), np.nan), "ddf.nii", "finite, invertible"),
    "sheared affine": (GOOD, SHEAR, "ddf.nii", "orthogonal axes"),
    "2D grid standing upright": (torch.zeros(2, 4, 4), np.eye(4)[[0, 2, 1, 3]], "ddf.nii", "x-y plane"),
    "suffix": (GOOD, np.eye(4), "ddf.mha", r"\.nii or \.nii\.gz"),
    "suffix alone": (GOOD, np.eye(4), ".nii.gz", r"\.nii or \.nii\.gz"),
    "no folder": (GOOD, np.eye(4), "missing/ddf.nii", "a folder that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_no_file(case: str, tmp_path: Path) -> None:
    ddf, affine, name, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        write_displacement_field(ddf, affine, tmp_path / name)
    assert list(tmp_path.rglob("*")) == []


def test_folder_that_refuses_writing_is_named_in_the_error() -> None:
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("needs a folder in which nobody may create files")
    with pytest.raises(OSError, match="cannot write the displacement field.*/proc/self/ddf.nii"):
        write_displacement_field(GOOD, np.eye(4), folder / "ddf.nii")


def test_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_displacement_field(GOOD, np.eye(4), tmp_path / "ddf.nii.gz")
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_displacement_field(GOOD + 1, np.eye(4), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize(
    "shape, intent", [((4, 4, 4), 0), ((4, 4, 4, 3), 1007), ((4, 4, 4, 1, 3), 1006), ((4, 4, 2, 1, 2), 1007)]
)
def test_other_files_are_refused(shape: tuple[int, ...], intent: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros(shape, dtype=np.float32), np.eye(4))
    image.header.set_intent(intent)
    nib.save(image, tmp_path / "other.nii")
    with pytest.raises(ValueError, match=f"intent {intent}"):
        read_displacement_field(tmp_path / "other.nii")


def test_text_is_refused_and_a_missing_file_missed(tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("no image")
    with pytest.raises(ValueError, match="expects a NIfTI file"):
        read_displacement_field(tmp_path / "text.nii")
    nib.save(nib.MGHImage(np.zeros((4, 4, 4), dtype=np.float32), np.eye(4)), tmp_path / "other.mgz")
    with pytest.raises(ValueError, match="expects a NIfTI file, got MGHImage"):
        read_displacement_field(tmp_path / "other.mgz")
    with pytest.raises(FileNotFoundError):
        read_displacement_field(tmp_path / "missing.nii")


def scan(name: str, affine: np.ndarray, shape: tuple[int, ...] = (4, 5, 6)) -> MetaTensor:
    return MetaTensor(torch.zeros(1, *shape), affine=torch.as_tensor(affine), meta={"filename_or_obj": name})


def test_transform_takes_grid_and_name_from_the_fixed_image(tmp_path: Path) -> None:
    ddf = torch.randn(3, 4, 5, 6)
    # A network's output carries the meta data of the first image it was given: here, the wrong ones.
    pred = MetaTensor(ddf, affine=torch.eye(4), meta={"filename_or_obj": "moving.nii.gz"})
    data = {"fixed": scan("/data/fixed.v2.nii.gz", GRIDS["oblique"]), "ddf": pred}
    result = Compose([SaveTransformd("ddf", tmp_path / "new" / "folder")])(data)
    path = tmp_path / "new" / "folder" / "fixed.v2_ddf.nii.gz"
    assert result["ddf_path"] == str(path) and "ddf_path" not in data
    again, affine = read_displacement_field(path)
    torch.testing.assert_close(again, ddf, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(affine, GRIDS["oblique"], atol=1e-5)


def test_transform_falls_back_on_the_field_itself(tmp_path: Path) -> None:
    ddf = MetaTensor(torch.zeros(3, 4, 5, 6), affine=torch.as_tensor(GRIDS["LPS"]), meta={"filename_or_obj": "a.nrrd"})
    for meta_key in ("fixed", None):
        result = SaveTransformd("ddf", tmp_path, output_postfix="u", output_ext=".nii", meta_key=meta_key)({"ddf": ddf})
        assert Path(result["ddf_path"]).name == "a_u.nii"
    np.testing.assert_allclose(read_displacement_field(result["ddf_path"])[1], GRIDS["LPS"], atol=1e-6)


def test_transform_names_pairs_and_several_keys_apart(tmp_path: Path) -> None:
    data = {"fixed": scan("f.mha", np.eye(4)), "moving": scan("m.nii", np.eye(4)), "a": GOOD, "b": GOOD}
    data["fixed"] = scan("f.mha", np.eye(4), (4, 4, 4))
    options = {"name_keys": ["moving", "fixed"], "allow_missing_keys": True}
    SaveTransformd(["a", "b", "absent"], tmp_path, **options)(data)
    SaveTransformd(["a", "b"], tmp_path, output_postfix="u", **options)(data)
    names = ["m_to_f_a.nii.gz", "m_to_f_b.nii.gz", "m_to_f_u_a.nii.gz", "m_to_f_u_b.nii.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    "data, message",
    [
        ({"ddf": GOOD}, "to be a MetaTensor"),
        ({"ddf": GOOD, "fixed": scan("f.nii", np.eye(4))}, r"on the grid of data\['fixed'\], \(4, 5, 6\)"),
        ({"ddf": GOOD, "fixed": MetaTensor(GOOD)}, "filename_or_obj"),
        ({}, "ddf"),
    ],
)
def test_transform_refuses_what_it_cannot_place_or_name(data: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError if data else KeyError, match=message):
        SaveTransformd("ddf", tmp_path)(data)
    assert list(tmp_path.iterdir()) == []


FILES = ["scan.nii.gz", "x/scan.v2.nii", "scan.gz", "a b/.hidden.png", "folder.d/noext", ["t1.nii.gz", "t2.nii"]]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_one_rule_names_images_fields_and_lists(file: str | list[str], tmp_path: Path) -> None:
    data = {"moving": scan("m.mha", np.eye(4)), "fixed": scan("f.nii", np.eye(4), (4, 4, 4)), "ddf": GOOD}
    data["moving"].meta["filename_or_obj"] = file
    expected = result_name([file, "f.nii"])
    data["u"] = MetaTensor(GOOD, affine=np.eye(4))
    warped = WarpImaged("fixed", field_key="u", name_keys=["moving", "fixed"])(data)["moved"]
    named = warped.meta["filename_or_obj"]
    field = Path(SaveTransformd("ddf", tmp_path, name_keys=["moving", "fixed"])(data)["ddf_path"]).name
    assert (named, field) == (f"{expected}.nii.gz", f"{expected}_ddf.nii.gz")


@pytest.mark.parametrize("file", [None, "", "folder/", []])
def test_images_without_a_file_name_are_refused(file: object, tmp_path: Path) -> None:
    data = {"moving": scan("m.mha", np.eye(4)), "fixed": scan("f.nii", np.eye(4), (4, 4, 4)), "ddf": GOOD}
    data["moving"].meta["filename_or_obj"] = file
    with pytest.raises(ValueError, match="SaveTransformd expects images that carry 'filename_or_obj'"):
        SaveTransformd("ddf", tmp_path, name_keys=["moving", "fixed"])(data)
    with pytest.raises(ValueError, match="expected the path of a file"):
        WarpImaged("fixed", field_key="u", name_keys=["moving", "fixed"])({**data, "u": MetaTensor(GOOD)})
