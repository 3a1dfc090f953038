"""Displacement files and measures as the Learn2Reg and LUMIR challenges define them, apart from those of `metrics.py`.

The challenges keep displacements in voxels of the fixed image's array, for moving and fixed images that share a grid:
`moved(x) = moving(x + displacement(x))`. Where the grids differ, `equireg.world.index_displacement` counts them between
the two arrays.

Reference: the evaluation scripts of Learn2Reg, https://github.com/MDL-UzL/L2R, and LUMIR,
https://github.com/JHU-MedImage-Reg/LUMIR_L2R.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.utils import convert_to_tensor

from .atomic import written_whole
from .fields import full_precision, jacobian_determinant

__all__ = ["learn2reg_folding_count", "learn2reg_sd_log_jacobian", "read_learn2reg", "write_learn2reg"]

_SUFFIXES = (".nii.gz", ".nii", ".npz")
_CUT = 2  # voxels left out at every side


def write_learn2reg(ddf: torch.Tensor | np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write a displacement as `disp_*.nii.gz`: shape `(X, Y, Z, 3)`, voxels, float32, no orientation.

    Learn2Reg also takes `.npz`: the same array in float16, whose steps are 1/32 voxel from 32 voxels on.

    Args:
        ddf: `(3, X, Y, Z)`, or `(2, X, Y)`, voxels along the array axes, finite.
        path: file to write, ending in `.nii`, `.nii.gz` or `.npz`, in a folder that exists.

    Returns:
        The path written; the file appears whole or not at all.

    Raises:
        ValueError: if the ddf is not such an array, the path ends otherwise, or its folder does not exist.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_learn2reg(torch.ones(3, 4, 5, 6), Path(folder, "disp_0001_0002.nii.gz"))
        ...     nib.load(path).shape, read_learn2reg(path).shape
        ((4, 5, 6, 3), torch.Size([3, 4, 5, 6]))
    """
    path = Path(path)
    suffix = next((s for s in _SUFFIXES if path.name.endswith(s) and path.name != s), None)
    values = convert_to_tensor(ddf, track_meta=False).detach().cpu().float()
    if suffix is None or not path.parent.is_dir():
        raise ValueError(f"a displacement is written to a .nii, .nii.gz or .npz in a folder that exists, got '{path}'.")
    if values.dim() not in (3, 4) or values.shape[0] != values.dim() - 1 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"expected a finite displacement (D, *shape) with D = 2 or 3, got {list(values.shape)}.")
    array = values.movedim(0, -1).numpy()
    if suffix == ".npz" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"'{path}' holds displacements up to 65504 voxels, got {np.abs(array).max()}.")
    with written_whole(path, "displacement") as temporary:
        if suffix == ".npz":
            np.savez_compressed(temporary, array.astype(np.float16))
        else:
            nib.save(nib.Nifti1Image(array, np.eye(4)), temporary)
    return path


def read_learn2reg(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read what `write_learn2reg` or a participant of the challenges wrote.

    Args:
        path: NIfTI file, or `.npz` with one array, of shape `(X, Y, Z, 3)` or `(X, Y, 2)`, voxels; NIfTI also of shape
            `(3, X, Y, Z)`, which LUMIR takes. `.npz` of that shape were those of the challenges of 2020 and 2021, which
            held displacements in full voxels on a grid of half or full resolution, and are refused.

    Returns:
        The ddf `(D, *shape)`, float32, voxels.

    Raises:
        ValueError: if the file is missing, damaged, or of another shape.
    """
    damaged = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, nib.filebasedimages.ImageFileError)
    numpy = Path(path).name.endswith(".npz")
    try:
        values = _only_array(path) if numpy else nib.load(path).get_fdata(dtype=np.float32)  # type: ignore[attr-defined]
    except damaged as error:
        raise ValueError(f"'{path}' is no displacement that can be read: {error}") from error
    if not numpy and values.ndim == 4 and values.shape[0] == 3 != values.shape[-1]:
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (3, 4) or values.shape[-1] != values.ndim - 1 or not np.isfinite(values).all():
        raise ValueError(f"'{path}' should hold finite displacements (X, Y, Z, 3) or (X, Y, 2), got {values.shape}.")
    return torch.from_numpy(np.moveaxis(values, -1, 0).copy())


def _only_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the array of real numbers that an `.npz` file holds under any name."""
    with np.load(path) as arrays:
        if len(arrays.files) != 1 or arrays[arrays.files[0]].dtype.kind not in "fiu":
            raise ValueError(f"it should hold one array of real numbers, got {arrays.files}")
        return arrays[arrays.files[0]].astype(np.float32)


def learn2reg_sd_log_jacobian(ddf: torch.Tensor) -> torch.Tensor:
    """Return SDlogJ as the challenges print it: three is added to the determinant, which hides folds.

    The standard deviation of `log(clip(det + 3, 1e-9, 1e9))` over the voxels at least two away from the border, by
    central differences. `equireg.metrics.sd_log_jacobian` adds nothing, and leaves folded voxels out.

    Args:
        ddf: `(B, D, *shape)`, voxels, D from 1 to 3, axes of at least 5 voxels.

    Returns:
        `(B,)`, no unit.

    Raises:
        ValueError: if the shape is not of that form.

    Example:
        >>> learn2reg_sd_log_jacobian(torch.zeros(1, 3, 6, 6, 6))
        tensor([0.])
    """
    return _shifted_determinant(ddf).log().flatten(1).std(dim=1, correction=0)


def learn2reg_folding_count(ddf: torch.Tensor) -> torch.Tensor:
    """Return the number of foldings as the challenges print it: always 0, as it is counted after clipping at 1e-9.

    `equireg.metrics.folding_fraction` tells how much really folds.

    Args:
        ddf: as for `learn2reg_sd_log_jacobian`.

    Returns:
        `(B,)`, voxels.

    Raises:
        ValueError: as `learn2reg_sd_log_jacobian`.

    Example:
        >>> from .fields import identity_grid
        >>> learn2reg_folding_count(-2.0 * identity_grid([6, 6, 6]))  # mirrors every axis
        tensor([0.])
    """
    determinant = _shifted_determinant(ddf)
    return (determinant <= 0).flatten(1).sum(dim=1).to(determinant.dtype)


def _shifted_determinant(ddf: torch.Tensor) -> torch.Tensor:
    """Return the clipped determinant plus three, `(B, 1, *smaller shape)`."""
    determinant = jacobian_determinant(full_precision(convert_to_tensor(ddf, track_meta=False)), scheme="central")
    for axis in range(2, determinant.dim()):
        size = determinant.shape[axis] - 2 * _CUT
        if size < 1:
            raise ValueError(f"the challenges' measures expect axes of at least 5 voxels, got {list(ddf.shape)}.")
        determinant = determinant.narrow(axis, _CUT, size)
    return (determinant + 3.0).clamp(1e-9, 1e9)
