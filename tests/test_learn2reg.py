"""Files and measures of the Learn2Reg and LUMIR challenges, against their published definitions in NumPy and SciPy."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d, map_coordinates

from equireg import fields, metrics
from equireg.learn2reg import (
    learn2reg_folding_count,
    learn2reg_sd_log_jacobian,
    read_learn2reg,
    write_learn2reg,
)


def published(ddf: np.ndarray) -> np.ndarray:
    """Evaluate the challenges' determinant of one ddf `(D, *shape)` in float64: plus three, clipped."""
    dims = len(ddf)
    slopes = [
        [correlate1d(c, [-0.5, 0.0, 0.5], axis=axis, mode="constant") for axis in range(dims)]
        for c in ddf.astype(np.float64)
    ]
    jacobian = np.moveaxis(np.array(slopes), (0, 1), (-2, -1)) + np.eye(dims)
    inner = jacobian[(slice(2, -2),) * dims]
    return np.clip(np.linalg.det(inner) + 3, 1e-9, 1e9)


@pytest.mark.parametrize("shape", [(9, 8, 7), (5, 5, 5), (6, 13, 5), (12, 9), (5, 6)])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_sd_log_jacobian_is_the_published_one(shape: tuple[int, ...], size: float) -> None:
    ddf = size * torch.randn(3, len(shape), *shape, dtype=torch.float64)
    kept = ddf.clone()
    expected = [np.log(published(sample.numpy())).std() for sample in ddf]
    value = learn2reg_sd_log_jacobian(ddf)
    assert value.shape == (3,) and value.dtype == torch.float64 and torch.equal(ddf, kept)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(learn2reg_sd_log_jacobian(ddf.float()), expected, rtol=0, atol=1e-4)


def test_extreme_determinants_are_clipped_on_both_sides() -> None:
    ddf = 2000 * torch.randn(1, 3, 8, 8, 8, dtype=torch.float64)
    determinant = published(ddf[0].numpy())
    assert determinant.min() == 1e-9 and determinant.max() == 1e9
    np.testing.assert_allclose(learn2reg_sd_log_jacobian(ddf), [np.log(determinant).std()], rtol=1e-10)


def test_border_of_two_voxels_does_not_count() -> None:
    ddf = torch.zeros(1, 3, 9, 9, 9, dtype=torch.float64)
    ddf[:, :, :2] = 50.0
    ddf[:, :, 2] = 0.5  # voxel 1 and 3 see it, and only 3 counts
    alone = torch.zeros_like(ddf)
    alone[:, :, 2] = 0.5
    alone[:, :, 1] = 50.0  # of the border, voxel 2 sees voxel 1 alone
    assert learn2reg_sd_log_jacobian(ddf) == learn2reg_sd_log_jacobian(alone) > 0
    alone[:, :, 1] = 0.0
    assert learn2reg_sd_log_jacobian(ddf) > learn2reg_sd_log_jacobian(alone)


def test_scaling_by_hand() -> None:
    """Half the inner voxels keep their volume, half are scaled by 1.5 along one axis: log 4 and log 4.5."""
    ramp = 0.5 * torch.clamp(torch.arange(12.0, dtype=torch.float64) - 5.5, min=0)
    ddf = torch.zeros(1, 3, 12, 6, 6, dtype=torch.float64)
    ddf[0, 0] = ramp[:, None, None]
    logs = np.log(3 + np.array([1, 1, 1, 1.125, 1.375, 1.5, 1.5, 1.5]))
    assert learn2reg_sd_log_jacobian(ddf).item() == pytest.approx(logs.std(), abs=1e-12)


def test_folds_hide_behind_the_shift_and_the_clip() -> None:
    """What the challenges print differs from what is true."""
    mirrored = -2.0 * fields.identity_grid([8, 8, 8])
    assert metrics.folding_fraction(mirrored).tolist() == [1.0]
    assert learn2reg_folding_count(mirrored).tolist() == [0.0]
    wild = 10 * torch.randn(2, 3, 9, 8, 7)
    assert all((published(sample.numpy()) <= 0).sum() == 0 for sample in wild)
    assert learn2reg_folding_count(wild).tolist() == [0.0, 0.0]
    assert bool((metrics.folding_fraction(wild) > 0.3).all())


@pytest.mark.parametrize("shape", [(2, 3, 4, 9, 9), (1, 3, 9, 9, 4), (1, 2, 9, 9, 9), (3, 9, 9, 9), (1, 2, 4, 9)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for measure in (learn2reg_sd_log_jacobian, learn2reg_folding_count):
        with pytest.raises(ValueError, match=r"got \["):
            measure(torch.zeros(shape))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(7, 9, 11), (5, 6, 3), (8, 13)])
def test_file_moves_images_as_the_challenges_do(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    ddf = 2 * torch.randn(1, len(shape), *shape)
    kept = ddf.clone()
    path = write_learn2reg(ddf[0], tmp_path / f"disp_0001_0002{suffix}")
    assert list(tmp_path.iterdir()) == [path] and torch.equal(ddf, kept)
    image = nib.load(path)
    assert image.shape == (*shape, len(shape)) and image.get_data_dtype() == np.float32
    assert np.array_equal(image.affine, np.eye(4)) and image.header.get_slope_inter() == (None, None)
    moving = torch.randn(1, 1, *shape)
    where = np.indices(shape) + np.moveaxis(image.get_fdata(), -1, 0)
    theirs = map_coordinates(moving[0, 0].numpy().astype(np.float64), where, order=1, mode="nearest")
    np.testing.assert_allclose(fields.warp(moving, ddf)[0, 0], theirs, atol=1e-5)
    again = read_learn2reg(path)
    assert again.dtype == torch.float32 and torch.equal(again, ddf[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_any_real_type_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    ddf = torch.full((3, 4, 5, 6), 2).to(dtype)
    for given in (ddf, ddf.numpy()):
        assert read_learn2reg(write_learn2reg(given, tmp_path / "disp.nii")).unique().tolist() == [2.0]


GOOD = torch.zeros(3, 4, 5, 6)
BAD = {
    "batch axis": (GOOD[None], "disp.nii", r"\[1, 3, 4, 5, 6\]"),
    "components last": (torch.zeros(4, 5, 6, 3), "disp.nii", r"\[4, 5, 6, 3\]"),
    "NaN": (torch.full((3, 4, 5, 6), torch.nan), "disp.nii", "finite"),
    "suffix": (GOOD, "disp.mha", "disp.mha"),
    "suffix alone": (GOOD, ".nii.gz", r"\.nii\.gz"),
    "no folder": (GOOD, "missing/disp.nii", "folder that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_no_file(case: str, tmp_path: Path) -> None:
    ddf, name, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        write_learn2reg(ddf, tmp_path / name)
    assert list(tmp_path.rglob("*")) == []


def test_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_learn2reg(GOOD, tmp_path / "disp.nii.gz")
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device.*disp.nii.gz"):
        write_learn2reg(GOOD + 1, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.9])
def test_what_cannot_be_read_is_one_error(suffix: str, share: float | None, tmp_path: Path) -> None:
    path = tmp_path / f"disp{suffix}"
    if share is not None:
        data = write_learn2reg(torch.randn(3, 4, 5, 6), path).read_bytes()
        path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"disp{suffix}' is no displacement that can be read"):
        read_learn2reg(path)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1, 3), (4, 5, 6, 4), (4, 5, 3)])
def test_other_images_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, dtype=np.float32), np.eye(4)), tmp_path / "image.nii")
    with pytest.raises(ValueError, match="image.nii' should hold finite displacements"):
        read_learn2reg(tmp_path / "image.nii")


def test_components_may_come_first_in_nifti(tmp_path: Path) -> None:
    """LUMIR takes both orders."""
    ddf = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(ddf, np.eye(4)), tmp_path / "disp.nii.gz")
    assert torch.equal(read_learn2reg(tmp_path / "disp.nii.gz"), torch.from_numpy(ddf))


def test_numpy_files_hold_half_precision(tmp_path: Path) -> None:
    ddf = 20 * torch.randn(3, 4, 5, 6)
    path = write_learn2reg(ddf, tmp_path / "disp_0001_0002.npz")
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0"]
        assert arrays["arr_0"].shape == (4, 5, 6, 3) and arrays["arr_0"].dtype == np.float16
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_learn2reg(path), ddf.half().float())
    np.savez(path, any_name=ddf.movedim(0, -1).numpy())
    assert torch.equal(read_learn2reg(path), ddf)
    with pytest.raises(ValueError, match="65504"):
        write_learn2reg(ddf * 1e5, tmp_path / "far.npz")


def test_other_numpy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disp.npz"
    np.savez(path, a=np.zeros((4, 5, 6, 3)), b=np.zeros(1))
    with pytest.raises(ValueError, match="disp.npz.*one array"):
        read_learn2reg(path)
    np.savez(path, np.array([None]))  # reading it would run code that the file brings
    with pytest.raises(ValueError, match="disp.npz"):
        read_learn2reg(path)
    np.savez(path, np.zeros((3, 4, 5, 6), dtype=np.float16))  # of the first challenges, of half resolution
    with pytest.raises(ValueError, match=r"disp.npz.*\(3, 4, 5, 6\)"):
        read_learn2reg(path)
    for content in (b"", b"no archive", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="disp.npz"):
            read_learn2reg(path)


def test_damaged_compression_is_one_error(tmp_path: Path) -> None:
    path = write_learn2reg(torch.randn(3, 9, 9, 9), tmp_path / "disp.nii.gz")
    data = bytearray(path.read_bytes())
    data[30:200] = bytes(170)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="disp.nii.gz"):
        read_learn2reg(path)
