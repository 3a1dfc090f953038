"""Displacement fields as files that ITK, SimpleITK and ANTs read.

Inside the project a ddf counts voxels along array axes on a grid whose affine maps voxel indices to RAS+ millimeters.
ITK wants millimeters along the world axes of LPS+, where x and y point the other way. Both sides pull back: a point of
the fixed image goes to the point of the moving image it is compared with.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from .atomic import written_whole
from .blocks import blocks, is_finite
from .lists import result_name
from .threads import gzipped

__all__ = [
    "SaveTransformD",
    "SaveTransformDict",
    "SaveTransformd",
    "itk_grid_affine",
    "read_displacement_field",
    "write_displacement_field",
]

_INTENT_VECTOR = 1007  # not 1006 ("displacement"): ITK takes that one for RAS and flips x and y
_SUFFIXES = (".nii.gz", ".nii")
_LAYERS = 8  # of a ddf that are written at a time


def write_displacement_field(
    ddf: torch.Tensor | np.ndarray, affine: torch.Tensor | np.ndarray, path: str | os.PathLike[str]
) -> Path:
    """Write a ddf as an ITK displacement field in a NIfTI file.

    The file holds `diag(-1, -1, 1) @ affine[:3, :3] @ ddf` at each voxel: millimeters, LPS+, float32, shape
    `(X, Y, Z, 1, 3)` or `(X, Y, 1, 1, 2)`, intent "vector". It appears whole or not at all: a failure leaves neither
    a broken file nor a temporary one, and a file that was there before stays.

    Args:
        ddf: `(D, *spatial)` with D = 2 or 3, voxels along the array axes of the grid it lives on, finite.
        affine: `(4, 4)`, or for 2D also `(3, 3)`; voxel indices of that grid to RAS+ millimeters.
        path: file to write, ending in `.nii` or `.nii.gz`, in a folder that exists.

    Returns:
        The path written.

    Raises:
        ValueError: if the ddf is not such an array, if the affine does not fit it, is singular, sheared, or turns a 2D
            grid out of the x-y plane, if the path ends otherwise or its folder does not exist.
        OSError: if the file cannot be written.

    Reference: the NIfTI-1 header, https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h, and ITK's
    `itk::NiftiImageIO`, https://docs.itk.org.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_displacement_field(torch.ones(3, 4, 5, 6), torch.eye(4), Path(folder, "ddf.nii.gz"))
        ...     nib.load(path).shape, nib.load(path).get_fdata()[0, 0, 0, 0].tolist()
        ((4, 5, 6, 1, 3), [-1.0, -1.0, 1.0])
    """
    path = Path(path)
    suffix = next((s for s in _SUFFIXES if path.name.endswith(s) and path.name != s), None)
    if suffix is None or not path.parent.is_dir():
        raise ValueError(
            f"write_displacement_field expects a path ending in .nii or .nii.gz in a folder that exists, got '{path}'."
        )
    voxels = convert_to_tensor(ddf, track_meta=False).detach().cpu()
    dims, finite = voxels.dim() - 1, is_finite(voxels)
    if dims not in (2, 3) or voxels.shape[0] != dims or 0 in voxels.shape or not finite:
        raise ValueError(
            "write_displacement_field expects a finite ddf of shape (2, X, Y) or (3, X, Y, Z), "
            f"got shape {tuple(voxels.shape)}{'' if finite else ' with NaN or infinity'}."
        )
    grid = itk_grid_affine(affine, dims)
    shape = (*voxels.shape[1:], *[1] * (4 - dims), dims)  # (X, Y, Z, 1, D)
    image = nib.Nifti1Image(np.broadcast_to(np.float32(0), shape), grid)
    # Readers disagree on which of the two orientations counts: write both alike.
    image.set_sform(grid, code=1)
    image.set_qform(grid, code=1)
    image.header.set_intent(_INTENT_VECTOR)
    image.header.set_xyzt_units("mm")
    with written_whole(path, "displacement field") as temporary:
        parts = _parts(image, voxels, _voxel_to_lps(grid, dims))
        with temporary.open("wb") as stream:
            stream.writelines(gzipped(parts) if suffix == ".nii.gz" else (make() for make in parts))
    return path


def read_displacement_field(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an ITK displacement field from a NIfTI file, the inverse of `write_displacement_field`.

    Args:
        path: NIfTI file of shape `(X, Y, Z, 1, 3)` or `(X, Y, 1, 1, 2)` with intent "vector", millimeters, LPS+.

    Returns:
        The ddf `(D, *spatial)`, float32, voxels along the array axes of its grid; and the affine `(4, 4)` of that
        grid, float64, voxel indices to RAS+ millimeters.

    Raises:
        ValueError: if the file is no such field.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_displacement_field(torch.ones(2, 4, 5), 3 * torch.eye(3), Path(folder, "ddf.nii"))
        ...     ddf, affine = read_displacement_field(path)
        >>> ddf.shape, ddf.unique().tolist(), affine.diagonal().tolist()
        (torch.Size([2, 4, 5]), [1.0], [3.0, 3.0, 1.0, 1.0])
    """
    try:
        image = nib.load(path)
    except nib.filebasedimages.ImageFileError as error:
        raise ValueError(f"read_displacement_field expects a NIfTI file, got '{path}': {error}") from error
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"read_displacement_field expects a NIfTI file, got {type(image).__name__} in '{path}'.")
    intent = int(image.header["intent_code"])
    shape = image.shape
    dims = shape[-1]
    fits = len(shape) == 5 and shape[3] == 1 and (dims == 3 or (dims == 2 and shape[2] == 1))
    if intent != _INTENT_VECTOR or not fits:
        raise ValueError(
            f"read_displacement_field expects shape (X, Y, Z, 1, 3) or (X, Y, 1, 1, 2) and intent {_INTENT_VECTOR}, "
            f"got shape {shape} and intent {intent} in '{path}'."
        )
    field = np.moveaxis(np.asanyarray(image.dataobj).reshape(*shape[:dims], dims), -1, 0)
    grid = itk_grid_affine(image.affine, dims)
    to_voxels, ddf = np.linalg.inv(_voxel_to_lps(grid, dims)), torch.empty(field.shape)
    for where in blocks(field.shape[1:]):
        ddf[where] = torch.from_numpy(np.einsum("ij,j...->i...", to_voxels, field[where], dtype=np.float64)).float()
    return ddf, torch.from_numpy(grid)


class SaveTransformd(MapTransform):
    """Write the ddf of each item as an ITK displacement field, for any host that runs MONAI transforms.

    The file is called `<name>_<output_postfix><output_ext>`, where the name is that of the file the fixed image came
    from. `SaveImaged` does not serve here: it would write voxels and no intent, and resample the components.

    Args:
        keys: items holding a ddf `(D, *spatial)`, D = 2 or 3, voxels of its grid, without a batch axis.
        output_dir: folder to write to; created if it does not exist.
        output_postfix: last part of the file name, the key if left out; with several keys, `<output_postfix>_<key>`.
        output_ext: `.nii.gz` or `.nii`.
        meta_key: item whose affine (voxel indices to RAS+ millimeters) and shape belong to the ddf's grid. An item
            that lacks this key, or `None`, leaves the affine to the ddf itself, which must then be a `MetaTensor`.
        name_keys: items whose file names form the name, joined by "_to_"; `meta_key` if left out. Where a fixed image
            occurs in several pairs, `("moving", "fixed")` keeps their files apart.
        allow_missing_keys: skip items that lack a key instead of raising.

    Raises:
        ValueError: when called, if no affine or no file name is found, if the shapes of the ddf and of `meta_key`
            differ, or for whatever `write_displacement_field` refuses.

    Example:
        >>> import tempfile
        >>> fixed = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.eye(4), meta={"filename_or_obj": "scan.nii.gz"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = SaveTransformd("ddf", folder)({"fixed": fixed, "ddf": torch.zeros(3, 4, 5, 6)})
        >>> Path(data["ddf_path"]).name
        'scan_ddf.nii.gz'
    """

    def __init__(
        self,
        keys: KeysCollection = "ddf",
        output_dir: str | os.PathLike[str] = "./output",
        output_postfix: str | None = None,
        output_ext: str = ".nii.gz",
        meta_key: str | None = "fixed",
        name_keys: Sequence[str] | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.output_postfix = output_postfix
        self.output_ext = output_ext
        self.meta_key = meta_key
        self.name_keys = (name_keys,) if isinstance(name_keys, str) else name_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files of one decollated item.

        Args:
            data: the item; it is not changed.

        Returns:
            A copy of the item with the path of each file, a string, under `<key>_path`.
        """
        result = dict(data)
        for key in self.key_iterator(result):
            grid = result.get(self.meta_key, result[key])
            if not isinstance(grid, MetaTensor):
                raise ValueError(
                    f"SaveTransformd expects data['{self.meta_key}'] or data['{key}'] to be a MetaTensor, whose affine "
                    f"places the field, got {type(grid).__name__}."
                )
            if grid.shape[1:] != result[key].shape[1:]:
                raise ValueError(
                    f"SaveTransformd expects a ddf on the grid of data['{self.meta_key}'], {tuple(grid.shape[1:])}, "
                    f"got {tuple(result[key].shape)}."
                )
            sources = [grid] if self.name_keys is None else [result.get(name) for name in self.name_keys]
            name = _result_name("SaveTransformd", sources)
            postfix = [str(key)] if self.output_postfix is None else [self.output_postfix]
            if self.output_postfix is not None and len(self.keys) > 1:
                postfix.append(str(key))
            stem = "_".join([name, *postfix])
            self.output_dir.mkdir(parents=True, exist_ok=True)
            path = write_displacement_field(result[key], grid.affine, self.output_dir / f"{stem}{self.output_ext}")
            result[f"{key}_path"] = str(path)
        return result


SaveTransformD = SaveTransformDict = SaveTransformd


def _parts(image: nib.Nifti1Image, ddf: torch.Tensor, to_lps: np.ndarray) -> Iterator[Callable[[], bytes]]:
    """Yield what makes the parts of a NIfTI file: nibabel would want all of its values in memory."""

    def header() -> bytes:
        stream = io.BytesIO()
        image.update_header()
        image.header.set_slope_inter(1.0, 0.0)
        image.header.write_to(stream)
        return stream.getvalue()

    def component(row: Sequence[float], layers: torch.Tensor) -> bytes:
        millimeters = sum(step * voxels.double() for step, voxels in zip(row, layers))
        assert isinstance(millimeters, torch.Tensor)
        return millimeters.float().numpy().tobytes(order="F")

    yield header
    for row in to_lps.tolist():
        for layers in ddf.split(_LAYERS, dim=-1):
            yield partial(component, row, layers)


def _to_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    """Copy an array of real numbers to float64 memory that nothing else holds."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().to(torch.float64).numpy()
    return np.array(array, dtype=np.float64)


def itk_grid_affine(affine: torch.Tensor | np.ndarray, dims: int) -> np.ndarray:
    """Check that ITK can place a grid in the world: its axes must be orthogonal, those of a 2D grid in the x-y plane.

    Args:
        affine: `(4, 4)` or `(D + 1, D + 1)`, voxel indices to RAS+ millimeters.
        dims: D, 2 or 3.

    Returns:
        `(4, 4)`, float64; the axis a 2D grid lacks is that of the world.

    Raises:
        ValueError: if the affine has another shape, is not finite or singular, sheared, or leads out of the x-y plane.

    Example:
        >>> itk_grid_affine(2 * torch.eye(3), dims=2).diagonal().tolist()
        [2.0, 2.0, 1.0, 1.0]
    """
    given = _to_numpy(affine)
    grid = np.eye(4)
    if given.shape == (dims + 1, dims + 1):
        grid[:dims, :dims], grid[:dims, 3] = given[:dims, :dims], given[:dims, dims]
    elif given.shape == (4, 4):
        grid = given
    else:
        raise ValueError(f"A {dims}D displacement field expects an affine of shape (4, 4), got {given.shape}.")
    if dims == 2:
        grid[:3, 2] = (0.0, 0.0, 1.0)
    axes = grid[:3, :dims]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(grid).all() or lengths.min() < 1e-9 or not np.array_equal(grid[3], (0, 0, 0, 1)):
        raise ValueError(f"A displacement field expects a finite, invertible affine, got {given.tolist()}.")
    cosines = (axes / lengths).T @ (axes / lengths) - np.eye(dims)
    if np.abs(cosines).max() > 1e-3:  # ITK knows no shear; rounding of real headers stays below this
        raise ValueError(f"A displacement field expects an affine with orthogonal axes, got {given.tolist()}.")
    if dims == 2 and np.abs(axes[2] / lengths).max() > 1e-3:
        raise ValueError(f"A 2D displacement field expects a grid in the x-y plane, got {given.tolist()}.")
    return grid


def _voxel_to_lps(grid: np.ndarray, dims: int) -> np.ndarray:
    """Return the `(D, D)` matrix that turns voxels along the array axes into millimeters along those of LPS+."""
    return np.diag([-1.0, -1.0, 1.0])[:dims, :dims] @ grid[:dims, :dims]


def _result_name(user: str, images: Sequence[Any]) -> str:
    """Return the name that results made of these images bear, from the files they were loaded from."""
    files = [image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None for image in images]
    try:
        return result_name(files)
    except ValueError as error:
        raise ValueError(
            f"{user} expects images that carry 'filename_or_obj' to name its files, got {files}."
        ) from error
