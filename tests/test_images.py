"""Image files in and out, with SimpleITK as the judge of geometry and nothing but errors for damaged files."""

from __future__ import annotations

import builtins
import errno
import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from equireg.images import read_image, read_label, read_mask, same_grid, writable_folder, write_image

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("itk", reason="needs ITK for NRRD, MetaImage and DICOM")


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn about x, y and z in this order, in degrees."""
    a, b, c = np.radians((x, y, z))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def make_affine(direction: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """Return a `(4, 4)` affine, also for a 2D grid in the x-y plane."""
    dims, affine = len(spacing), np.eye(4)
    affine[:dims, :dims] = direction[:dims, :dims] @ np.diag(spacing)
    affine[:dims, 3] = origin
    return affine


OBLIQUE = rotation(25, -10, 40)
GRIDS = {
    "RAS": (make_affine(np.eye(3), (1, 1, 1), (-5, 3, 8)), (5, 7, 6)),
    "LPS": (make_affine(np.diag([-1, -1, 1]), (0.8, 0.9, 2.5), (4, -3, 8)), (5, 7, 6)),
    "LAS": (make_affine(np.diag([-1, 1, 1]), (2, 1, 1), (40, -3, 8)), (5, 6, 7)),
    "oblique": (make_affine(OBLIQUE, (0.7, 1.3, 3), (-31, 17, 90)), (9, 5, 3)),
    "nearly half a turn": (make_affine(rotation(0.01, 0.02, 179.99), (0.5, 0.5, 3), (120, 80, -900)), (9, 5, 3)),
    "left-handed, axes permuted": (make_affine(OBLIQUE[:, [2, 0, 1]] * [1, -1, 1], (2, 1, 0.5), (9, 1, -7)), (4, 3, 5)),
    "one slice": (make_affine(OBLIQUE, (0.7, 1.3, 3), (1, 2, 3)), (6, 5, 1)),
    "2D": (make_affine(np.eye(3), (1, 1), (5, -7)), (6, 9)),
    "2D oblique, anisotropic": (make_affine(rotation(0, 0, 30), (0.6, 1.7), (-12, 30)), (9, 6)),
    "2D flipped": (make_affine(np.diag([-1, 1, 1]), (2, 0.5), (7, -3)), (5, 8)),
}
SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
NIFTI = (".nii", ".nii.gz")


def values_of(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return an array whose values are all different."""
    return np.random.default_rng(len(shape)).permutation(int(np.prod(shape))).reshape(shape).astype(dtype)


def image_on(name: str, dtype: Any = np.float32) -> MetaTensor:
    affine, shape = GRIDS[name]
    return MetaTensor(torch.from_numpy(values_of(shape, dtype))[None], affine=torch.from_numpy(affine))


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **fields: Any) -> Path:
    """Write a NIfTI file with header fields that nibabel would not let through."""
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine, dtype=values.dtype)
    nib.save(image, path)
    if fields:
        content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        for key, value in fields.items():
            header[key] = value
        content[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


def simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return values and RAS affine `(D + 1, D + 1)` of a file as SimpleITK sees them."""
    image = sitk.ReadImage(str(path))
    dims = image.GetDimension()
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * image.GetSpacing()
    affine[:dims, dims] = image.GetOrigin()
    affine[:2] *= -1
    return sitk.GetArrayFromImage(image).T, affine


def write_with_simpleitk(path: Path, values: np.ndarray, affine: np.ndarray, **options: Any) -> Path:
    dims = values.ndim
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    lps = np.diag([-1.0, -1.0, 1.0])[:dims, :dims]
    spacing = np.linalg.norm(affine[:dims, :dims], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps @ affine[:dims, :dims] / spacing).ravel().tolist())
    image.SetOrigin((lps @ affine[:dims, 3]).tolist())
    sitk.WriteImage(image, str(path), **options)
    return path


def gap(affine: np.ndarray, expected: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return by how many voxels two affines differ at most in a box of this shape."""
    dims = len(shape)
    matrix = (affine[:dims, :dims] - expected[:dims, :dims]) @ np.diag(shape)
    offset = affine[:dims, -1] - expected[:dims, -1]
    inverse = np.linalg.inv(expected[:dims, :dims])
    return float(np.abs(inverse @ matrix).sum() + np.abs(inverse @ offset).sum())


def digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---- geometry and values, both ways ----


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", GRIDS)
def test_what_is_written_lies_where_simpleitk_says(name: str, suffix: str, tmp_path: Path) -> None:
    image, (affine, shape) = image_on(name), GRIDS[name]
    before = image.clone()
    path = write_image(image, tmp_path / f"image{suffix}")
    assert path == tmp_path / f"image{suffix}" and [p.name for p in tmp_path.iterdir()] == [path.name]
    values, found = simpleitk(path)
    assert np.array_equal(values, image[0].numpy()) and values.ndim == len(shape)
    assert gap(found, affine, shape) < (1e-4 if suffix in NIFTI else 1e-9)  # NIfTI stores 32 bits
    again = read_image(path)
    assert (
        again.shape == image.shape
        and again.dtype == torch.float32
        and torch.equal(again.as_tensor(), image.as_tensor())
    )
    assert again.affine.dtype == torch.float64 and again.affine.shape == (4, 4)
    assert gap(again.affine.numpy(), affine, shape) < (1e-4 if suffix in NIFTI else 1e-9)
    assert again.meta["filename_or_obj"] == str(path)
    assert torch.equal(image, before) and torch.equal(image.affine, before.affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", GRIDS)
def test_what_simpleitk_writes_is_read_where_it_lies(name: str, suffix: str, tmp_path: Path) -> None:
    affine, shape = GRIDS[name]
    values = values_of(shape, np.int16)
    path = write_with_simpleitk(tmp_path / f"image{suffix}", values, affine)
    before = digest(path)
    image = read_image(path, spatial_dims=len(shape))
    assert np.array_equal(image[0].numpy(), values) and image.dtype == torch.float32
    tolerance = 2e-3 if suffix in NIFTI else 1e-9  # ITK rounds the direction of NIfTI files
    assert gap(image.affine.numpy(), affine, shape) < tolerance
    theirs, found = simpleitk(path)
    assert np.array_equal(theirs, values) and gap(image.affine.numpy(), found, shape) < tolerance
    assert digest(path) == before


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd", ".mgz", ".png"])
def test_monai_reads_the_same(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    if suffix == ".png":
        path = write_with_simpleitk(path, values_of((9, 6), np.uint8), np.eye(4))
    elif suffix == ".mgz":
        nib.save(nib.MGHImage(values_of((4, 3, 5)), GRIDS["oblique"][0]), path)
    else:
        path = write_with_simpleitk(path, values_of((4, 3, 5)), GRIDS["oblique"][0])
    ours = read_image(path)
    theirs = LoadImage(reader="NibabelReader" if suffix == ".mgz" else None)(path)
    assert torch.equal(ours[0].as_tensor(), theirs.as_tensor())
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-12)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".png"])
def test_real_images_are_read_as_monai_reads_them(suffix: str, shared_data: Path) -> None:
    files = sorted(shared_data.rglob(f"*{suffix}"))
    if not files:
        pytest.skip(f"needs a {suffix} file in {shared_data}")
    for path in files[:: max(1, len(files) // 3)]:
        ours, theirs = read_image(path), LoadImage()(path)
        assert torch.equal(ours[0].float().as_tensor(), theirs.as_tensor())
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
)
def test_types_are_kept_in_files(dtype: str, suffix: str, tmp_path: Path) -> None:
    values = values_of((3, 4, 5), dtype)
    kept = values.copy()
    image = MetaTensor(torch.from_numpy(values), affine=torch.eye(4))
    found, _ = simpleitk(write_image(image, tmp_path / f"image{suffix}"))
    expected = {"bool": "uint8"}.get(dtype, dtype)
    if suffix != ".nii.gz" and dtype in ("int64", "uint64"):
        expected = "int32"
    if suffix != ".nii.gz" and dtype == "int8":
        expected = "int16"
    assert found.dtype == expected and np.array_equal(found, values)
    assert np.array_equal(values, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_written_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    image = MetaTensor(torch.arange(6).reshape(1, 2, 3).to(dtype).requires_grad_(), affine=torch.eye(4))
    found = nib.load(write_image(image, tmp_path / "image.nii"))
    assert found.get_data_dtype() == np.float32 and found.get_fdata().ravel().tolist() == list(range(6))
    assert torch.equal(read_image(image).as_tensor(), image.detach().as_tensor().float())


def test_large_integers_reach_nifti_exactly_and_itk_if_they_fit(tmp_path: Path) -> None:
    extreme = torch.tensor([[-(2**63), 2**63 - 1]])
    path = write_image(MetaTensor(extreme, affine=torch.eye(4)), tmp_path / "image.nii.gz")
    assert np.asarray(nib.load(path).dataobj).ravel().tolist() == extreme.ravel().tolist()
    for value, kind in ((2**31, np.uint32), (2**40, np.float64)):
        large = MetaTensor(torch.tensor([[0, value]]), affine=torch.eye(4))
        found, _ = simpleitk(write_image(large, tmp_path / "image.mha"))
        assert found.dtype == kind and found.ravel().tolist() == [0, value]
    with pytest.raises(
        ValueError, match="image.nrrd' cannot hold integers such as 9223372036854775808: write a .nii.gz"
    ):
        write_image(MetaTensor(extreme, affine=torch.eye(4)), tmp_path / "image.nrrd")


def test_header_of_written_nifti(tmp_path: Path) -> None:
    header = nib.load(write_image(image_on("oblique"), tmp_path / "image.nii.gz")).header
    assert header.get_sform(coded=True)[1] == header.get_qform(coded=True)[1] == 1
    assert header.get_xyzt_units()[0] == "mm" and header.get_slope_inter() == (None, None)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)
    flat = nib.load(write_image(image_on("2D flipped"), tmp_path / "flat.nii"))
    assert flat.header["dim"].tolist() == [2, 5, 8, 1, 1, 1, 1, 1] and flat.header.get_zooms() == (2.0, 0.5)
    long = MetaTensor(torch.arange(2.0 * 40000).reshape(1, 2, 40000), affine=torch.eye(4))
    assert torch.equal(read_image(write_image(long, tmp_path / "long.nii")).as_tensor(), long.as_tensor())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shear_is_kept_or_refused_by_itk_but_never_lost(suffix: str, tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1], affine[2, 2] = 0.2, 3
    image = MetaTensor(torch.from_numpy(values_of((1, 3, 4, 5))), affine=torch.from_numpy(affine))
    path = write_image(image, tmp_path / f"image{suffix}")
    assert gap(read_image(path).affine.numpy(), affine, (3, 4, 5)) < 1e-5
    if suffix in NIFTI:
        with pytest.raises(RuntimeError, match="orthonormal"):
            simpleitk(path)
    else:
        assert gap(simpleitk(path)[1], affine, (3, 4, 5)) < 1e-9


@pytest.mark.parametrize("dims", [None, 2, 3])
def test_channel_axis_of_an_image_to_write(dims: int | None, tmp_path: Path) -> None:
    image = MetaTensor(torch.arange(20.0).reshape(1, 4, 5), affine=torch.eye(4))
    assert nib.load(write_image(image, tmp_path / "a.nii", dims)).shape == ((1, 4, 5) if dims == 3 else (4, 5))
    assert nib.load(write_image(image[0], tmp_path / "b.nii")).shape == (4, 5)
    image = MetaTensor(torch.arange(40.0).reshape(2, 4, 5), affine=torch.eye(4))
    assert nib.load(write_image(image, tmp_path / "c.nii")).shape == (2, 4, 5)


# ---- values ----


def test_scaling_of_the_file_is_applied(tmp_path: Path) -> None:
    path = nifti(tmp_path / "image.nii.gz", values_of((3, 4, 5), np.int16), scl_slope=0.5, scl_inter=-1000)
    np.testing.assert_array_equal(read_image(path)[0], values_of((3, 4, 5)) * 0.5 - 1000)


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize(
    "dtype, top, expected",
    [
        ("uint8", 255, torch.float32),
        ("uint16", 65535, torch.float32),
        ("int32", 2**24, torch.float32),
        ("int32", 2**24 + 1, torch.float64),
        ("uint32", 2**32 - 1, torch.float64),
        ("int64", 2**24, torch.float32),
        ("int64", -(2**53) + 1, torch.float64),
        ("uint64", 2**53 - 1, torch.float64),
        ("uint64", 2**63, torch.float32),
        ("float32", 1e30, torch.float32),
        ("float64", 1e30, torch.float64),
        ("float64", 1e300, torch.float64),
        ("float64", 0.1, torch.float32),
        ("float64", 1e-200, torch.float64),
        ("float64", 2.0**24 + 1, torch.float64),
    ],
)
def test_no_value_is_lost(dtype: str, top: float, expected: torch.dtype, suffix: str, tmp_path: Path) -> None:
    values = np.zeros((2, 3, 2), dtype)
    values[1, 2, 1] = top
    path = tmp_path / f"image{suffix}"
    if suffix == ".nii":
        nifti(path, values)
    else:
        write_with_simpleitk(path, values, np.eye(4))
    image = read_image(path)
    assert image.dtype == expected
    assert image[0, 1, 2, 1].item() == pytest.approx(float(top), rel=1e-7 if "float" in dtype else 0, abs=0)
    assert image.count_nonzero() == 1


def test_small_contrast_on_a_large_offset_survives() -> None:
    values = 1e6 + np.linspace(0, 0.01, 12).reshape(3, 4)
    image = read_image((values, np.eye(4)))
    assert image.dtype == torch.float64 and np.array_equal(image[0].numpy(), values)


def test_byte_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values_of((3, 4, 5), ">i2"), GRIDS["oblique"][0], nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "image.nii")
    assert nib.load(tmp_path / "image.nii").header.endianness == ">"
    assert np.array_equal(read_image(tmp_path / "image.nii")[0], values_of((3, 4, 5)))


@pytest.mark.parametrize("unit, factor", [("meter", 1000), ("micron", 0.001), ("mm", 1), ("unknown", 1)])
def test_units_of_the_file_become_millimeters(unit: str, factor: float, tmp_path: Path) -> None:
    affine, shape = GRIDS["oblique"]
    image = nib.Nifti1Image(values_of(shape), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "image.nii")
    found = read_image(tmp_path / "image.nii").affine.numpy()
    expected = np.diag([factor, factor, factor, 1]) @ affine
    assert gap(found, expected, shape) < 1e-5 and gap(found, simpleitk(tmp_path / "image.nii")[1], shape) < 1e-4
    np.testing.assert_allclose(read_image(image).affine, found, rtol=1e-6)


def test_unit_that_nifti_does_not_know_counts_as_millimeters(tmp_path: Path) -> None:
    path = nifti(tmp_path / "image.nii", values_of((3, 4, 5)), xyzt_units=6)
    assert torch.equal(read_image(path).affine, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 7, 6), (5, 7)])
@pytest.mark.parametrize("sform, qform", [(0, 0), (1, 0), (0, 1), (2, 4)])
def test_nifti_that_says_nowhere_where_it_lies_is_marked(
    sform: int, qform: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0][: len(shape)] + [1.0] * (4 - len(shape)))
    path = nifti(tmp_path / "image.nii.gz", values_of(shape, np.uint8), affine, sform_code=sform, qform_code=qform)
    image, unplaced = read_image(path), sform == qform == 0
    for found in (image, read_image(nib.load(path)), read_image(image), read_label(path), read_mask(path)):
        assert found.meta.get("unplaced") is (True if unplaced else None)
        assert np.array_equal(found.affine, nib.load(path).affine) and np.array_equal(found.affine, image.affine)
    # The mark is for files that programs place differently, and for no other.
    assert (gap(image.affine.numpy(), simpleitk(path)[1], shape) > 1) == unplaced
    if unplaced:
        center = image.affine.numpy()[: len(shape)] @ [*(np.array(shape) - 1) / 2, *[0] * (3 - len(shape)), 1]
        assert center.tolist() == [0] * len(shape) and image.affine[1, 1] == 3
        assert simpleitk(path)[1][: len(shape), -1].tolist() == [0] * len(shape) and simpleitk(path)[1][1, 1] == -3
    for other in (write_image(image, tmp_path / f"placed{suffix}") for suffix in SUFFIXES):
        assert "unplaced" not in read_image(other).meta


def test_sources_with_an_affine_are_not_marked_as_unplaced() -> None:
    image = nib.Nifti1Image(values_of((3, 4, 5)), None)  # neither code is set
    assert read_image(image).meta["unplaced"] is True
    for source in sources("oblique").values():
        assert "unplaced" not in read_image(source).meta


# ---- sources that are no files ----


def sources(name: str) -> dict[str, Any]:
    affine, shape = GRIDS[name]
    values = values_of(shape)
    dims = len(shape)
    small = np.eye(dims + 1)
    small[:dims, :dims], small[:dims, dims] = affine[:dims, :dims], affine[:dims, 3]
    return {
        "MetaTensor": image_on(name),
        "nibabel": nib.Nifti1Image(values, affine),
        "array": (values, affine),
        "array, small affine": (values, small),
        "tensors": (torch.from_numpy(values), torch.from_numpy(affine)),
        "integers": (values.astype(np.int32), affine.tolist()),
        "array that is not contiguous": (np.asfortranarray(values)[::-1][::-1], affine),
    }


@pytest.mark.parametrize("name", ["oblique", "2D oblique, anisotropic"])
@pytest.mark.parametrize("kind", sources("RAS"))
def test_any_source_is_the_same_image_and_is_not_touched(kind: str, name: str) -> None:
    source, (affine, shape) = sources(name)[kind], GRIDS[name]
    image = read_image(source, "fixed image", len(shape))
    assert np.array_equal(image[0], values_of(shape)) and image.dtype == torch.float32
    assert gap(image.affine.numpy(), affine, shape) < 1e-6 and image.affine.dtype == torch.float64
    assert image.meta["filename_or_obj"] == "fixed_image"
    label, mask = read_label(source), read_mask(source)
    for result in (image, label, mask):
        result.zero_()
        result.affine.zero_()
    again = sources(name)[kind]
    for part, expected in zip(
        source if isinstance(source, tuple) else [source], again if isinstance(again, tuple) else [again]
    ):
        if isinstance(part, nib.Nifti1Image):
            assert part.header == expected.header and np.array_equal(part.affine, expected.affine)
            assert not part.in_memory or np.array_equal(part.dataobj, expected.dataobj)
        else:
            assert np.array_equal(np.asarray(part), np.asarray(expected))
    if isinstance(source, MetaTensor):
        assert torch.equal(source.affine, again.affine)


def test_names_and_frames_of_tensors_are_respected() -> None:
    lps = MetaTensor(torch.rand(1, 3, 4), affine=torch.eye(4), meta={"filename_or_obj": "a.nii", "space": "LPS"})
    image = read_image(lps)
    assert image.affine.diagonal().tolist() == [-1, -1, 1, 1] and image.meta["filename_or_obj"] == "a.nii"
    assert torch.equal(read_image(image).affine, image.affine)


def test_opened_file_is_read_like_its_path(tmp_path: Path) -> None:
    path = nifti(tmp_path / "image.nii.gz", values_of((3, 4, 5), np.int16), GRIDS["oblique"][0], scl_slope=2)
    image = read_image(nib.load(path))
    assert torch.equal(image, read_image(path)) and torch.equal(image.affine, read_image(str(path)).affine)
    assert image.meta["filename_or_obj"] == str(path)


@pytest.mark.parametrize(
    "source, message",
    [
        (torch.rand(1, 3, 4), "should be a path, a MetaTensor, a nibabel image or a pair .*, got Tensor"),
        (np.zeros((3, 4)), "got ndarray"),
        (None, "got NoneType"),
        (MetaTensor(torch.rand(2, 3, 4)), r"shape \(1, X, Y\) or \(1, X, Y, Z\), got \(2, 3, 4\): choose one channel"),
        (MetaTensor(torch.rand(3, 4)), r"got \(3, 4\)"),
        (MetaTensor(torch.rand(1, 1, 3, 4, 5)), r"got \(1, 1, 3, 4, 5\)"),
        (MetaTensor(torch.ones(1, 3, 4, dtype=torch.complex64)), "complex64 values: convert it to real numbers"),
        ((np.array([["a", "b"]]), np.eye(4)), "holds <U1 values"),
        ((np.zeros((3, 4)), np.eye(2)), r"affine of shape \(4, 4\), got 2 axes and an affine of shape \(2, 2\)"),
        ((np.zeros((3, 4, 5)), np.eye(3)), r"got 3 axes and an affine of shape \(3, 3\)"),
        ((np.zeros((3, 4, 5)), np.full((4, 4), np.nan)), "should be finite"),
        ((np.zeros((3, 4, 5)), np.diag([1, 0, 1, 1])), "positive spacing"),
        ((np.zeros((3, 4, 5)), np.diag([1, 1, 1, 2])), "last row of 0, 0, 0, 1"),
        ((np.zeros((3, 4, 5)), np.eye(4)[[0, 0, 2, 3]]), "positive spacing"),
        ((np.zeros((3, 4, 5)), np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])), "is singular"),
        ((np.zeros((3, 4)), np.eye(4)[[0, 2, 1, 3]]), "2D but does not lie in the x-y plane"),
        ((np.zeros(5), np.eye(4)), r"shape \(5,\): choose an image with two or three axes"),
        ((np.zeros((3, 0, 5)), np.eye(4)), r"empty axis, its shape is \(3, 0, 5\)"),
    ],
)
def test_other_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^The moving image.*{message}"):
        read_image(source, "moving image")


# ---- number of axes ----


def test_single_slices_and_series(tmp_path: Path) -> None:
    affine = make_affine(rotation(0, 0, 30), (0.6, 1.7, 5), (-12, 30, 50))
    volume = values_of((4, 5, 1))
    for suffix in (".nii.gz", ".mha"):
        path = tmp_path / f"slice{suffix}"
        write_with_simpleitk(path, volume, affine)
        assert read_image(path).shape == read_image(path, spatial_dims=3).shape == (1, 4, 5, 1)
        image = read_image(path, spatial_dims=2)
        assert np.array_equal(image[0], volume[..., 0])
        assert gap(image.affine.numpy(), affine, (4, 5)) < 1e-3
    path = nifti(tmp_path / "series.nii", values_of((3, 4, 5, 1, 1)))
    assert read_image(path).shape == (1, 3, 4, 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_along_any_axis_counts_if_it_lies_in_the_plane(axis: int) -> None:
    steps = np.diag([2.0, 3.0, 5.0])
    order = {0: [2, 0, 1], 1: [0, 2, 1], 2: [1, 0, 2]}[axis]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps[:, order], (7, 8, 9)
    shape = [4, 5, 6]
    shape[axis] = 1
    values = values_of(tuple(shape))
    image = read_image((values, affine), spatial_dims=2)
    assert np.array_equal(image[0], values.squeeze(axis))
    for index in ((0, 0), (2, 3)):  # the voxel lies where it did
        full = list(index)
        full.insert(axis, 0)
        expected = affine @ [*full, 1]
        assert (image.affine.numpy() @ [*index, 0, 1]).tolist() == expected.tolist()
        assert (image.affine.numpy()[:2, :2] @ index + image.affine.numpy()[:2, 3]).tolist() == expected[:2].tolist()
    with pytest.raises(ValueError, match="one slice that does not lie in the x-y plane"):
        read_image((values, upright(affine)), spatial_dims=2)


def upright(affine: np.ndarray) -> np.ndarray:
    """Turn a grid so that its x-y plane stands up."""
    return make_affine(rotation(90, 0, 0), (1, 1, 1), (0, 0, 0)) @ affine


@pytest.mark.parametrize(
    "shape, dims, message",
    [
        ((4, 5), 3, r"is 2D, of shape \(4, 5\): choose a 3D image"),
        ((4, 5, 6), 2, r"is 3D, of shape \(4, 5, 6\): choose a 2D image or a volume of one slice"),
        ((4, 5, 6, 2), None, r"shape \(4, 5, 6, 2\), a series of volumes"),
        ((4, 5, 1, 2), 2, "a series of volumes"),
        ((4, 5, 6, 1, 3), 3, "or of components: save one of them"),
        ((4, 5), 4, "spatial_dims should be 2, 3 or None, got 4"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_other_numbers_of_axes_are_refused(
    shape: tuple[int, ...], dims: int | None, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"image{suffix}"
    if suffix == ".nii.gz":
        nifti(path, values_of(shape))
    elif len(shape) < 5:
        sitk.WriteImage(sitk.GetImageFromArray(values_of(shape).T.copy(), isVector=False), str(path))
    else:
        pytest.skip("ITK for Python has no images of five axes")
    with pytest.raises(ValueError, match=message):
        read_image(path, spatial_dims=dims)


# ---- files that are not what they should be ----


def damaged(case: str, folder: Path) -> tuple[Path, str]:
    """Make a file or folder that cannot be read, and say what the message should hold."""
    values = np.random.default_rng(0).random((20, 21, 22)).astype(np.float32)
    kind, _, suffix = case.partition(" ")
    path = folder / f"scan{suffix or '.nii'}"
    if kind in ("truncated", "flipped"):
        if ".nii" in suffix:
            nifti(path, values)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(values), str(path), useCompression=True)
        content = bytearray((path.with_suffix(".zraw") if suffix == ".mhd" else path).read_bytes())
        middle = len(content) // 2
        if kind == "truncated":
            del content[middle:]
        else:
            content[middle : middle + 20] = bytes(byte ^ 0x5A for byte in content[middle : middle + 20])
        (path.with_suffix(".zraw") if suffix == ".mhd" else path).write_bytes(content)
        return path, "cut short|cannot be read as"
    if kind == "garbage":
        path.write_bytes(np.random.default_rng(1).bytes(5000))
        return path, "no NIfTI file|cannot be read as"
    if kind == "empty":
        path.touch()
        return path, "empty file of 0 bytes: copy or export it again"
    if kind == "header":
        source = folder / f"source{suffix}"
        write_with_simpleitk(source, values, np.eye(4)) if ".nii" not in suffix else nifti(source, values)
        path.write_bytes(source.read_bytes()[:40])
        return path, "no NIfTI file|cannot be read as"
    if kind == "misnamed":
        other = (
            folder / {".nii": "a.nrrd", ".nii.gz": "a.nii", ".mha": "a.nii", ".nrrd": "a.nii", ".png": "a.nii"}[suffix]
        )
        nifti(other, values) if other.suffix == ".nii" else write_with_simpleitk(other, values, np.eye(4))
        if suffix in (".mha", ".nrrd"):
            other.write_bytes(b"x" * 100 + other.read_bytes())
        other.rename(path)
        return path, "no NIfTI file|cannot be read as"
    raise AssertionError(case)


DAMAGED = [
    *(f"truncated {suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")),
    *(f"flipped {suffix}" for suffix in (".nii.gz", ".mha", ".mhd", ".nrrd")),
    *(f"garbage {suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".nrrd", ".mgz", ".png", ".dcm", ".tif")),
    *(f"empty {suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".png")),
    *(f"header {suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".nrrd")),
    *(f"misnamed {suffix}" for suffix in (".nii", ".nii.gz", ".mha", ".nrrd", ".png")),
]


@pytest.mark.parametrize("read", [read_image, read_label, read_mask])
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_sentence_with_the_name(
    case: str, read: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, message = damaged(case, tmp_path)
    before = digest(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, "moving scan")
    text = str(caught.value)
    assert text.startswith(f"The moving scan '{path}' ") and text.endswith(".") and "\n" not in text
    assert digest(tmp_path) == before and not recwarn.list


def test_checksum_of_a_compressed_file_counts(tmp_path: Path) -> None:
    """A flipped bit that still decompresses gives other values; only the checksum tells."""
    values = np.random.default_rng(0).integers(
        0, 255, (16, 16, 16), np.uint8
    )  # more than the header and its surroundings
    content = nifti(tmp_path / "a.nii", values).read_bytes()
    stored = bytearray(gzip.compress(content, compresslevel=0))  # stored as it is: any value decompresses
    stored[-100] ^= 1
    path = tmp_path / "image.nii.gz"
    path.write_bytes(stored)
    assert not np.array_equal(np.asarray(nib.load(path).dataobj), values)  # nibabel does not notice
    with pytest.raises(ValueError, match="image.nii.gz' cannot be read as compressed .*CRC"):
        read_image(path)
    body = bytearray(zlib.compress(values.tobytes(), 0))
    body[-100] ^= 1
    head = "NDims = 3\nDimSize = 16 16 16\nElementType = MET_UCHAR\nCompressedData = True\n"
    head += f"CompressedDataSize = {len(body)}\n"
    path = tmp_path / "image.mha"
    path.write_bytes(head.encode() + b"ElementDataFile = LOCAL\n" + body)
    with pytest.raises(ValueError, match="image.mha' cannot be read as an image .*incorrect data check"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("compressed", [True, False])
def test_sound_files_of_all_layouts_are_read(suffix: str, compressed: bool, tmp_path: Path) -> None:
    affine, shape = GRIDS["oblique"]
    path = write_with_simpleitk(tmp_path / f"IMAGE{suffix}", values_of(shape), affine, useCompression=compressed)
    image = read_image(path)
    assert np.array_equal(image[0], values_of(shape)) and gap(image.affine.numpy(), affine, shape) < 1e-9


def test_gzip_in_several_members_and_capitals_are_read(tmp_path: Path) -> None:
    content = nifti(tmp_path / "a.nii", values_of((5, 6, 7))).read_bytes()
    path = tmp_path / "SCAN.NII.GZ"
    path.write_bytes(gzip.compress(content[:300]) + gzip.compress(content[300:]))
    assert np.array_equal(read_image(path)[0], values_of((5, 6, 7)))


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^The fixed image '.*gone.nii' does not exist: check the path.$"):
        read_image(tmp_path / "gone.nii", "fixed image")
    with pytest.raises(ValueError, match="folder without a DICOM series: name an image file"):
        read_image(tmp_path)
    nifti(tmp_path / "a.nii", values_of((5, 6, 7))).rename(tmp_path / "a.img.bak")
    with pytest.raises(ValueError, match="a.img.bak' has an unknown suffix: choose a file ending in .nii.gz, .nii, "):
        read_image(tmp_path / "a.img.bak")
    with pytest.raises(ValueError, match="folder without a DICOM series"):
        read_image(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.nii")
        with pytest.raises(ValueError, match="is not a regular file"):
            read_image(tmp_path / "pipe.nii")
    monkeypatch.setenv("HOME", str(tmp_path))
    nifti(tmp_path / "home.nii", values_of((5, 6, 7)))
    assert read_image("~/home.nii").shape == (1, 5, 6, 7)


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "image.nii.gz", values_of((5, 6, 7)))
    opened = builtins.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ValueError, match="image.nii.gz' cannot be read as compressed .*Permission denied"):
        read_image(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, r"spacing of \[0.0, 1.0, 1.0\]: mend pixdim"),
        ({"pixdim": [1, 1, np.nan, 1, 1, 1, 1, 1]}, r"spacing of \[1.0, nan, 1.0\]"),
        ({"pixdim": [1, 1, 1, -2, 1, 1, 1, 1]}, r"spacing of \[1.0, 1.0, -2.0\]"),
        ({"pixdim": [1, 1, np.inf, 1, 1, 1, 1, 1]}, r"spacing of \[1.0, inf, 1.0\]"),
        ({"pixdim": [1, 1, 1, 2, 1, 1, 1, 1]}, r"contradicts itself, with voxels of \[1.0, 1.0, 2.0\] mm in pixdim"),
        ({"srow_x": [0, 0, 0, 0]}, "contradicts itself"),
        ({"srow_x": [0.6, 0.8, 0, 0], "srow_y": [0.8, 0.6, 0, np.nan]}, "should be finite"),
        ({"srow_x": [1, 1, 0, 0], "srow_y": [0, 0, 0, 0]}, "is singular"),
        ({"dim": [3, 5, 0, 7, 1, 1, 1, 1]}, r"empty axis, its shape is \(5, 0, 7\)"),
        ({"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, "empty axis"),
        ({"dim": [3, 5, 6, 70, 1, 1, 1, 1]}, "is cut short, .* bytes of .*: copy or export it again"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "is cut short"),
        ({"dim": [9, 5, 6, 7, 1, 1, 1, 1]}, "cannot be read as NIfTI"),
        ({"datatype": 999}, "cannot be read as NIfTI"),
        ({"vox_offset": 1e9}, "is cut short"),
        ({"vox_offset": np.nan}, "cannot be read as NIfTI"),
    ],
)
@pytest.mark.parametrize("suffix", NIFTI)
def test_nifti_headers_that_lie(fields: dict, message: str, suffix: str, tmp_path: Path, capfd: Any) -> None:
    path = nifti(tmp_path / f"image{suffix}", values_of((5, 6, 7)), **fields)
    with pytest.raises(ValueError, match=f"^The image '{path}' .*{message}"):
        read_image(path)
    if "spacing" in message:
        assert capfd.readouterr() == ("", "")  # nibabel would print that it repairs the spacing


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 0 1", "cannot be read as an image .*Zero-valued spacing"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 nan 1", "cannot be read as an image .*spacing"),
        ("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 1 0 0", "cannot be read as an image .*direction"),
        ("Offset = 0 0 0", "Offset = nan 0 0", "its position is not a number"),
        ("DimSize = 7 6 5", "DimSize = 7 0 5", "empty axis"),
        ("DimSize = 7 6 5", "DimSize = 7 6 9", "cannot be read as an image"),
        ("ElementDataFile = LOCAL", "ElementDataFile = gone.raw", "cannot be read as an image"),
    ],
)
def test_metaimage_headers_that_lie(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.mha"
    sitk.WriteImage(sitk.GetImageFromArray(values_of((5, 6, 7))), str(path), useCompression=False)
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=message):
        read_image(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_values_that_are_no_numbers(bad: float, suffix: str, tmp_path: Path) -> None:
    values = values_of((5, 6, 7))
    values[1, 2, 3:5] = bad
    path = tmp_path / f"image{suffix}"
    nifti(path, values) if suffix == ".nii.gz" else write_with_simpleitk(path, values, np.eye(4))
    for read in (read_image, read_label, read_mask):
        with pytest.raises(ValueError, match="holds 2 of 210 values that are NaN or infinite: repair it"):
            read(path)


@pytest.mark.parametrize("value", [0, -3.5, 1e30])
def test_constant_image_but_not_label_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="The fixed image is .* everywhere, which leaves nothing to register"):
        read_image((np.full((4, 5), value), np.eye(4)), "fixed image")
    assert read_label((np.zeros((4, 5)), np.eye(4))).unique().tolist() == [0]


@pytest.mark.parametrize("dtype", ["complex64", "complex128", [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_and_color_nifti(dtype: Any, tmp_path: Path) -> None:
    path = nifti(tmp_path / "image.nii.gz", np.ones((3, 4, 5), np.dtype(dtype)))
    message = (
        "values: convert it to real numbers" if isinstance(dtype, str) else "in color: convert it to one gray value"
    )
    for source in (path, nib.load(path)):
        with pytest.raises(ValueError, match=message):
            read_image(source)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("kind", ["color", "complex", "vector"])
def test_complex_and_color_itk(kind: str, suffix: str, tmp_path: Path) -> None:
    shape = (4, 5, 6) if kind == "complex" else (4, 5, 6, 3)
    values = values_of(shape, {"color": np.uint8, "complex": np.complex64, "vector": np.float32}[kind])
    image = sitk.GetImageFromArray(values, isVector=kind != "complex")
    sitk.WriteImage(image, str(tmp_path / f"image{suffix}"))
    with pytest.raises(ValueError, match="holds [23] numbers per voxel"):
        read_image(tmp_path / f"image{suffix}")


def test_pictures(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    gray = values_of((9, 6), np.uint8)
    for mode, dtype in (("L", np.uint8), ("I;16", np.uint16)):
        pil.fromarray(gray.T.astype(dtype).copy()).save(tmp_path / f"{dtype.__name__}.png")
        image = read_image(tmp_path / f"{dtype.__name__}.png", spatial_dims=2)
        assert np.array_equal(image[0], gray) and torch.equal(image.affine, torch.eye(4, dtype=torch.float64)), mode
    pil.fromarray(gray.T.copy() % 2 == 1).save(tmp_path / "bits.png")
    assert np.array_equal(read_mask(tmp_path / "bits.png")[0], gray % 2 == 1)
    for mode in ("RGB", "RGBA", "P", "LA"):
        pil.fromarray(gray).convert(mode).save(tmp_path / "color.png")
        with pytest.raises(ValueError, match=rf"color.png' is in color \(mode {mode}\): convert it"):
            read_image(tmp_path / "color.png")
    content = (tmp_path / "uint8.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.png' cannot be read as a picture"):
        read_image(tmp_path / "cut.png")


# ---- DICOM ----


def dicom_series(
    folder: Path,
    positions: list[tuple[float, float]],
    uid: str = "1.2.3",
    slopes: list[bytes] | None = None,
    orientation: str = "1\\0\\0\\0\\1\\0",
) -> np.ndarray:
    """Write one CT slice per (x, z) position in mm, LPS; return what the file holds `(X, Y, slices)`."""
    folder.mkdir(exist_ok=True)
    stack = []
    for number, (x, z) in enumerate(positions):
        values = (np.arange(30).reshape(5, 6) + 100 * number).astype(np.int16)
        image = sitk.GetImageFromArray(values[None])
        tags = {"0008|0060": "CT", "0020|000e": uid, "0020|000d": "1.2", "0008|0018": f"{uid}.{number}"}
        tags |= {
            "0020|0032": f"{x}\\20\\{z}",
            "0020|0037": orientation,
            "0028|0030": "0.9\\0.7",
            "0008|0021": "20200101",
        }
        tags |= {"0020|0013": str(number), "0028|1052": "0", "0028|1053": "1"}
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        path = folder / f"{uid}_{number}"
        writer.SetFileName(f"{path}.dcm")
        image.SetSpacing((0.7, 0.9, 2))
        writer.Execute(image)
        content = path.with_name(f"{path.name}.dcm").read_bytes()
        if slopes:
            tag = struct.pack("<HH", 0x28, 0x1053)
            at = content.index(tag) + 8
            content = content[:at] + slopes[number] + content[at + 2 :]
        path.with_name(f"{path.name}.dcm").unlink()
        path.write_bytes(content)  # scanners write names without a suffix
        stack.append(values.T * float(slopes[number] if slopes else 1))
    return np.stack(stack, axis=-1)


def test_dicom_series_lies_where_simpleitk_says(tmp_path: Path) -> None:
    values = dicom_series(tmp_path / "a", [(-10, 9), (-10, 7), (-10, 5), (-10, 3)])
    (tmp_path / "a" / "notes.txt").write_text("not DICOM")
    before = digest(tmp_path)
    image = read_image(tmp_path / "a", spatial_dims=3)
    assert np.array_equal(image[0], values[..., ::-1]) and image.dtype == torch.float32  # from foot to head
    expected = [[-0.7, 0, 0, 10], [0, -0.9, 0, -20], [0, 0, 2, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine, expected, atol=1e-9)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "a")))
    assert np.array_equal(sitk.GetArrayFromImage(reader.Execute()).T, image[0].numpy())
    assert image.meta["filename_or_obj"] == str(tmp_path / "a") and digest(tmp_path) == before
    one = read_image(tmp_path / "a" / "1.2.3_1", spatial_dims=2)
    assert np.array_equal(one[0], values[..., 1]) and one.affine[:2, 3].tolist() == [10, -20]


@pytest.mark.parametrize("slopes", [[b"1 ", b".5", b".2"], [b".2", b".5", b"1 "]])
def test_dicom_series_standing_upright_and_scaled_slice_by_slice(slopes: list[bytes], tmp_path: Path) -> None:
    values = dicom_series(tmp_path / "a", [(-8, 0), (-6, 0), (-4, 0)], slopes=slopes, orientation="0\\1\\0\\0\\0\\-1")
    image = read_image(tmp_path / "a")
    order = slice(None) if image.affine[0, 3] == 8 else slice(None, None, -1)
    np.testing.assert_allclose(image[0], values[..., order], rtol=1e-6)
    for index in range(3):
        x = image.affine.numpy() @ [0, 0, index, 1]
        np.testing.assert_allclose(x[:3], [[8, 6, 4][order][index], -20, 0], atol=1e-9)


@pytest.mark.parametrize(
    "positions",
    [
        [(0, 3), (0, 5), (0, 9), (0, 11)],
        [(0, 3), (0, 5), (0, 5), (0, 7)],
        [(0, 3), (0.3, 5), (0.6, 7), (0.9, 9)],
        [(0, 2 * i) for i in range(40) if i != 20],
    ],
    ids=["missing", "double", "tilted", "one of many missing"],
)
def test_dicom_slices_that_form_no_stack(positions: list[tuple[float, float]], tmp_path: Path, capfd: Any) -> None:
    dicom_series(tmp_path / "a", positions)
    with pytest.raises(ValueError, match="a' holds slices that form no even stack, .*complete the series"):
        read_image(tmp_path / "a")
    assert capfd.readouterr().err == ""


def test_dicom_folder_of_several_series(tmp_path: Path) -> None:
    for uid in ("1.2.3", "1.2.4"):
        dicom_series(tmp_path / "a", [(0, 3), (0, 5)], uid)
    with pytest.raises(ValueError, match="folder with 2 DICOM series: move one to a folder of its own"):
        read_image(tmp_path / "a")


def test_dicom_slice_that_is_cut_short(tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", [(0, 3), (0, 5), (0, 7)])
    path = tmp_path / "a" / "1.2.3_1"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match="a' holds '1.2.3_1', which is damaged or no slice: copy it again or remove it"
    ):
        read_image(tmp_path / "a")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a' holds '1.2.3_1', which is damaged"):
        read_image(tmp_path / "a")


# ---- packages that are missing ----


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".dcm"])
def test_missing_itk_is_named(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"image{suffix}"
    path.write_bytes(b"anything")
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "itk":
            raise ModuleNotFoundError("No module named 'itk'", name="itk")
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="image.* needs ITK: pip install itk"):
        read_image(path)
    with pytest.raises(ImportError, match="pip install itk"):
        read_image(tmp_path)
    if suffix != ".dcm":
        with pytest.raises(ImportError, match="pip install itk"):
            write_image(image_on("RAS"), tmp_path / f"new{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- labels, masks and their grids ----


@pytest.mark.parametrize(
    "values, dtype",
    [([0, 255], torch.int16), ([-1, 32767], torch.int16), ([0, 65535], torch.int32), ([0, 2**40], torch.int64)],
)
@pytest.mark.parametrize("stored", [np.int64, np.float64])
def test_labels_have_the_smallest_type(values: list[int], dtype: torch.dtype, stored: Any, tmp_path: Path) -> None:
    path = nifti(tmp_path / "label.nii.gz", np.array([values], stored))
    label = read_label(path)
    assert label.dtype == dtype and label.shape == (1, 1, 2) and label.flatten().tolist() == values
    assert label.meta["filename_or_obj"] == str(path)


def test_labels_that_a_file_scales_are_rounded(tmp_path: Path) -> None:
    path = nifti(tmp_path / "label.nii.gz", np.arange(60, dtype=np.uint8).reshape(3, 4, 5), scl_slope=1 + 1e-6)
    assert read_label(path).flatten().tolist() == list(range(60))


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 0.37, 1], "holds values such as 0.37; is it an image rather than a label map?"),
        ([0, 1.002, 1], "holds values such as 1.002;"),
        ([0, 1e30, 1], r"holds values such as 1e\+30;"),
        (np.array([0, 2**64 - 1, 1], np.uint64), "holds values such as 18446744073709551615: number"),
    ],
)
def test_labels_are_whole_numbers(values: Any, message: str) -> None:
    source = (np.array([values]), np.eye(4))
    for read in (read_label, read_mask):
        with pytest.raises(ValueError, match=f"The fixed labels {message}"):
            read(source, "fixed labels")


def test_mask_is_what_is_not_zero() -> None:
    mask = read_mask((np.array([[0, 1, -3, 200]]), GRIDS["2D flipped"][0]), "mask")
    assert mask.dtype == torch.bool and mask.tolist() == [[[False, True, True, True]]]
    assert mask.affine[:2, 3].tolist() == [7, -3] and mask.meta["filename_or_obj"] == "mask"
    with pytest.raises(ValueError, match="The fixed mask is 0 everywhere: mark the voxels inside with 1"):
        read_mask((np.zeros((3, 4)), np.eye(4)), "fixed mask")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("read", [read_label, read_mask])
def test_label_on_the_grid_of_its_image(name: str, read: Any, tmp_path: Path) -> None:
    image, shape = image_on(name), GRIDS[name][1]
    label = MetaTensor(torch.from_numpy(values_of(shape, np.uint8))[None], affine=image.affine)
    for suffix in SUFFIXES:
        like = read_image(write_image(image, tmp_path / f"image{suffix}"))
        for other in SUFFIXES:
            assert read(write_image(label, tmp_path / f"label{other}"), like=like).shape == image.shape
    source = (values_of(shape, np.uint8), moved(GRIDS[name][0], shape, 0.02))
    with pytest.raises(
        ValueError, match=r"The moving label lies on another grid, shape .* than its image, shape .*: resample"
    ):
        read(source, "moving label", like=image)
    with pytest.raises(ValueError, match="lies on another grid"):
        read((values_of((*shape[:-1], shape[-1] + 1), np.uint8), GRIDS[name][0]), like=image)


def moved(affine: np.ndarray, shape: tuple[int, ...], voxels: float) -> np.ndarray:
    """Shift a grid by so many voxels along its last axis."""
    shift = np.eye(4)
    shift[len(shape) - 1, 3] = voxels
    return affine @ shift


def test_label_of_one_slice_fits_a_2d_image() -> None:
    image = read_image((values_of((4, 5)), np.eye(4)))
    assert read_label((np.zeros((4, 5, 1)), np.eye(4)), like=image).shape == (1, 4, 5)
    volume = read_image((values_of((4, 5, 6)), np.eye(4)))
    with pytest.raises(ValueError, match="is 2D"):
        read_label((np.zeros((4, 5)), np.eye(4)), like=volume)
    with pytest.raises(ValueError, match="is 3D"):
        read_mask((np.ones((4, 5, 6)), np.eye(4)), like=image)


@pytest.mark.parametrize("name", GRIDS)
def test_same_grid_measures_voxels_at_the_corners(name: str) -> None:
    affine, shape = GRIDS[name]
    a = image_on(name)

    def grid(other: np.ndarray) -> MetaTensor:
        return MetaTensor(torch.zeros(2, *shape), affine=torch.from_numpy(other))

    assert same_grid(a, a) and same_grid(a, grid(affine))
    for voxels, same in ((0.0099, True), (0.0101, False)):
        assert same_grid(a, grid(moved(affine, shape, voxels))) == same
        grown = affine.copy()
        grown[:, 0] *= 1 + voxels / (shape[0] - 1)
        assert same_grid(grid(grown), a) == same
    flipped = affine.copy()
    flipped[:, 0] *= -1
    assert not same_grid(a, grid(flipped))
    assert not same_grid(a, MetaTensor(torch.zeros(1, *shape[:-1], shape[-1] + 1), affine=a.affine))
    if len(shape) == 2:
        thick = affine.copy()
        thick[2, 2], thick[2, 3] = 7, 100  # the third axis of a 2D grid does not count
        assert same_grid(a, grid(thick)) and not same_grid(a, image_on("RAS"))
    with pytest.raises(ValueError, match="singular|spacing"):
        same_grid(a, grid(np.diag([1.0, 0, 1, 1])))


# ---- writing that fails ----


@pytest.mark.parametrize(
    "image, name, message",
    [
        (torch.zeros(1, 3, 4), "a.nii", "expects a MetaTensor, whose affine places it, got Tensor"),
        (MetaTensor(torch.zeros(2, 3, 4, 5)), "a.nii", r"got torch.float32 of shape \(2, 3, 4, 5\)"),
        (MetaTensor(torch.zeros(3)), "a.nii", r"of shape \(3,\)"),
        (MetaTensor(torch.zeros(1, 3, 0)), "a.nii", r"of shape \(1, 3, 0\)"),
        (MetaTensor(torch.zeros(1, 3, 4, dtype=torch.complex64)), "a.nii", "got torch.complex64"),
        (MetaTensor(torch.zeros(1, 3, 4), affine=torch.zeros(4, 4)), "a.nii", "The image to write has the affine"),
        (image_on("RAS"), "a.mhd", r"a file ending in .nii.gz, .nii, .mha, .nrrd, got '.*a.mhd'"),
        (image_on("RAS"), "a.png", "a file ending in"),
        (image_on("RAS"), ".nii.gz", "a file ending in"),
        (image_on("RAS"), "gone/a.nii", "in a folder that exists, got '.*gone/a.nii'"),
        (image_on("RAS"), "gone/a.mha", "in a folder that exists"),
    ],
)
def test_what_cannot_be_written(image: Any, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_image(image, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_take_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.nii").mkdir()
    with pytest.raises(ValueError, match="in a folder that exists, got '.*a.nii'"):
        write_image(image_on("RAS"), tmp_path / "a.nii")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"The folder '{path}' cannot be created"):
            writable_folder(path)
    assert writable_folder(tmp_path / "x" / "y") == tmp_path / "x" / "y" == writable_folder(str(tmp_path / "x" / "y"))
    assert list((tmp_path / "x" / "y").iterdir()) == []
    if Path("/proc/self").is_dir():  # where not even root may create files
        with pytest.raises(ValueError, match="The folder '/proc/self' cannot be written to .*: choose another one"):
            writable_folder("/proc/self")
        with pytest.raises(ValueError, match="The folder '/proc/self' cannot be written to"):
            write_image(image_on("RAS"), "/proc/self/a.nii")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("stage", ["replace", "save"])
def test_full_disk_leaves_the_old_file_and_no_other(
    stage: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(image_on("RAS"), tmp_path / f"image{suffix}")
    before = digest(path)

    def full(source: Any, target: Any, *args: Any, **options: Any) -> None:
        Path(target).write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "replace":
        monkeypatch.setattr(os, "replace", lambda source, target: full(source, source))
    elif suffix in NIFTI:
        monkeypatch.setattr(nib, "save", full)
    else:
        itk = pytest.importorskip("itk")
        monkeypatch.setattr(itk, "imwrite", full)
    with pytest.raises(OSError, match=f"cannot write the image: No space left on device: '{path}'") as caught:
        write_image(image_on("LPS"), path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path] and digest(path) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_disk_that_really_refuses_bytes(suffix: str, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the libraries must notice that writing fails."""
    resource = pytest.importorskip("resource", reason="needs a system that can limit the size of files")
    image = MetaTensor(torch.rand(1, 40, 40, 40), affine=torch.eye(4))
    path = tmp_path / f"image{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write the image: .*image{suffix}'"):
            write_image(image, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
