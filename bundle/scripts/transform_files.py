"""Transforms as files that ITK, SimpleITK, ANTs and 3D Slicer read and write.

In memory a transform is a list of steps, see `equireg.world`: affines on RAS+ millimeters and displacement fields.
Files hold LPS+ millimeters. This module turns one into the other with ITK for Python, an extra (`pip install itk`);
only NIfTI fields do without.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from .io import itk_grid_affine, read_displacement_field, write_displacement_field
from .spaces import world_matrix
from .world import as_field, field_affine

__all__ = ["read_affine", "read_transform", "write_affine", "write_transform"]

_NIFTI = (".nii", ".nii.gz")
_IMAGES = (".nrrd", ".nhdr", ".mha", ".mhd")
_WITH_FIELDS = (".h5", ".hdf5")
_AFFINES = (".tfm", ".mat", *_WITH_FIELDS)
_TRANSFORMS = (".txt", ".xfm", *_AFFINES)


def read_transform(path: str | os.PathLike[str]) -> list[torch.Tensor]:
    """Read a transform that any program wrote with ITK.

    Args:
        path: a displacement field (`.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`), or an ITK transform file
            (`.tfm`, `.txt`, `.mat`, `.h5`, `.hdf5`, `.xfm`) that holds a linear transform, a displacement field, or a
            composite of them.

    Returns:
        The steps, first to last: affines `(D + 1, D + 1)`, float64, RAS+ millimeters, and displacement fields.

    Raises:
        ValueError: naming the file, if it is missing, damaged, of another format, or holds a transform of another kind.
        ImportError: if the file needs `itk`, which is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_affine(torch.diag(torch.tensor([2.0, 1.0, 1.0])), Path(folder, "double.tfm"))
        ...     read_transform(path)[0].diagonal().tolist()
        [2.0, 1.0, 1.0]
    """
    path = Path(path)
    suffix = _suffix(path, (*_NIFTI, *_IMAGES, *_TRANSFORMS))
    if not path.is_file():
        raise ValueError(f"there is no transform '{path}'.")
    if path.stat().st_size == 0:
        raise ValueError(f"the transform '{path}' is empty.")
    try:
        if suffix in _NIFTI:
            return [as_field(*read_displacement_field(path))]
        itk = _itk(path)
        if suffix in _IMAGES:
            return [_field(itk, itk.imread(os.fspath(path)), path)]
        found = itk.transformread(os.fspath(path))
    except (RuntimeError, OSError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"the transform '{path}' cannot be read: {_reason(error)}") from error
    if len(found) != 1:
        raise ValueError(f"'{path}' should hold one transform, got {len(found)}, whose order is not defined.")
    return _steps(itk, found[0], path)


def read_affine(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read a transform that is linear.

    Args:
        path: an ITK transform file, see `read_transform`.

    Returns:
        `(D + 1, D + 1)`, float64, RAS+ millimeters.

    Raises:
        ValueError: as `read_transform`, and if it holds a displacement field.
        ImportError: as `read_transform`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_affine(write_affine(torch.eye(4), Path(folder, "nothing.mat"))).shape
        torch.Size([4, 4])
    """
    steps = read_transform(path)
    if any(step.dim() != 2 for step in steps):
        raise ValueError(f"expected an affine, '{path}' holds a displacement field.")
    product = torch.eye(len(steps[0]), dtype=torch.float64)
    for step in steps:
        product = step @ product
    return product


def write_affine(affine: torch.Tensor, path: str | os.PathLike[str]) -> Path:
    """Write an affine as an ITK transform.

    Args:
        affine: `(D + 1, D + 1)`, D = 2 or 3, RAS+ millimeters.
        path: file to write, ending in `.tfm`, `.mat`, `.h5` or `.hdf5`, in a folder that exists.

    Returns:
        The path written; the file appears whole or not at all.

    Raises:
        ValueError: if the affine is none or has no inverse, or the path ends otherwise or its folder does not exist.
        ImportError: if `itk` is not installed.
        OSError: if the file cannot be written.
    """
    return write_transform([affine], path)


def write_transform(transform: Sequence[torch.Tensor], path: str | os.PathLike[str]) -> Path:
    """Write a transform for ITK: a displacement field, an affine, or a composite of steps.

    Args:
        transform: the steps, first to last, at least one.
        path: file to write, in a folder that exists: `.nii` or `.nii.gz` for one displacement field; `.tfm` or `.mat`
            for affines; `.h5` or `.hdf5` for anything.

    Returns:
        The path written; the file appears whole or not at all.

    Raises:
        ValueError: if there is no step or one is none, if the path ends otherwise or its folder does not exist.
        ImportError: if the file needs `itk`, which is not installed.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     steps = [torch.eye(3), as_field(torch.ones(2, 4, 5), torch.eye(3))]
        ...     path = write_transform(steps, Path(folder, "t.h5"))
        ...     [list(step.shape) for step in read_transform(path)]
        [[3, 3], [2, 4, 5]]
    """
    path = Path(path)
    suffix = _suffix(path, (*_NIFTI, *_AFFINES))
    fields = [step for step in transform if isinstance(step, MetaTensor)]
    if not transform or not path.parent.is_dir():
        raise ValueError(f"a transform of at least one step is written to a folder that exists, got '{path}'.")
    if suffix in _NIFTI:
        if len(transform) != 1 or not fields:
            raise ValueError(f"'{path}' holds one displacement field; chain the steps into one, or write them as .h5.")
        return write_displacement_field(fields[0], fields[0].affine, path)
    if fields and suffix not in _WITH_FIELDS:
        raise ValueError(f"a displacement field is written as .nii.gz or .h5, not as '{path}'.")
    itk = _itk(path)
    steps = [_to_itk(itk, step) for step in transform]
    whole = steps[0]
    if len(steps) > 1:
        whole = itk.CompositeTransform[itk.D, steps[0].GetInputSpaceDimension()].New()
        for step in reversed(steps):  # points pass through the transform that was added last first
            whole.AddTransform(step)
    return _save(path, suffix, lambda name: itk.transformwrite([whole], name, compression=bool(fields)))


def _steps(itk: Any, transform: Any, path: Path) -> list[torch.Tensor]:
    """Turn an ITK transform into steps."""
    transform = itk.down_cast(transform)
    kind = transform.GetNameOfClass()
    if kind == "CompositeTransform":
        parts = [transform.GetNthTransform(i) for i in range(transform.GetNumberOfTransforms())]
        return [step for part in reversed(parts) for step in _steps(itk, part, path)]
    if kind == "DisplacementFieldTransform":
        return [_field(itk, transform.GetDisplacementField(), path)]
    if not transform.IsLinear():
        raise ValueError(
            f"'{path}' holds a {kind}: linear transforms, displacement fields and composites of them can be read; "
            "export it as a displacement field."
        )
    dims = transform.GetInputSpaceDimension()
    # What a linear transform does to the origin and the unit vectors is all of it, however it is parametrized.
    corners = np.concatenate([np.zeros((1, dims)), np.eye(dims)])
    origin, *ends = (np.array(transform.TransformPoint(corner.tolist())) for corner in corners)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims], matrix[:dims, dims] = np.stack([end - origin for end in ends], axis=1), origin
    return [world_matrix(_flip(dims) @ matrix @ _flip(dims), dims)]


def _field(itk: Any, image: Any, path: Path) -> MetaTensor:
    """Turn an ITK image of displacements, LPS+ millimeters, into a displacement field."""
    dims = image.GetImageDimension()
    values = itk.array_from_image(image)
    if values.ndim != dims + 1 or values.shape[-1] != dims or dims not in (2, 3):
        raise ValueError(f"'{path}' should hold a displacement of D components at each voxel of a D-dimensional grid.")
    if not np.isfinite(values).all():
        raise ValueError(f"the displacement field '{path}' holds NaN or infinity.")
    grid = np.eye(dims + 1)
    direction = itk.array_from_matrix(image.GetDirection())
    grid[:dims, :dims] = direction * np.array(list(image.GetSpacing()))
    grid[:dims, dims] = list(image.GetOrigin())
    to_voxels = np.linalg.inv(grid[:dims, :dims])  # both sides in LPS+
    ddf = np.einsum("ij,...j->i...", to_voxels, values.transpose([*range(dims - 1, -1, -1), dims]).astype(np.float64))
    return as_field(torch.from_numpy(ddf), _flip(dims) @ grid)


def _to_itk(itk: Any, step: torch.Tensor) -> Any:
    """Turn a step into an ITK transform of double precision."""
    if not isinstance(step, MetaTensor):
        dims = len(step) - 1
        matrix = _flip(dims) @ world_matrix(step, dims).numpy() @ _flip(dims)
        affine = itk.AffineTransform[itk.D, dims].New()
        affine.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:dims, :dims])))
        affine.SetTranslation(matrix[:dims, dims].tolist())
        return affine
    dims = step.dim() - 1
    itk_grid_affine(step.affine, dims)
    grid = _flip(dims) @ field_affine(step).numpy()
    spacing = np.linalg.norm(grid[:dims, :dims], axis=0)
    image = itk.Image[itk.Vector[itk.D, dims], dims].New()
    image.SetRegions(list(step.shape[1:]))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(grid[:dims, dims].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(grid[:dims, :dims] / spacing)))
    image.Allocate()
    millimeters = np.einsum("ij,j...->...i", grid[:dims, :dims], step.as_tensor().double().numpy())
    itk.array_view_from_image(image)[...] = millimeters.transpose([*range(dims - 1, -1, -1), dims])
    field = itk.DisplacementFieldTransform[itk.D, dims].New()
    field.SetDisplacementField(image)
    return field


def _flip(dims: int) -> np.ndarray:
    """Return the matrix `(D + 1, D + 1)` that turns points of RAS+ into points of LPS+, and back."""
    return np.diag([*(-1.0, -1.0, 1.0)[:dims], 1.0])


def _save(path: Path, suffix: str, write: Callable[[str], Any]) -> Path:
    """Write a file under another name, and give it its own when it is complete."""
    temporary = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        write(os.fspath(temporary))
        os.replace(temporary, path)
    except RuntimeError as error:  # how ITK reports a full disk as well
        raise OSError(f"cannot write the transform '{path}': {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _suffix(path: Path, known: Sequence[str]) -> str:
    """Return how the name of a file ends."""
    found = next(
        (suffix for suffix in sorted(known, key=len, reverse=True) if path.name.lower().endswith(suffix)), None
    )
    if found is None or path.name.lower() == found:
        raise ValueError(f"the name of a transform ends in one of {', '.join(known)}, got '{path}'.")
    return found


def _itk(path: Path) -> Any:
    try:
        import itk
    except ImportError as error:
        raise ImportError(f"'{path}' needs ITK for Python: pip install itk, or 'equireg[itk]'.") from error
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk


def _reason(error: Exception) -> str:
    """Return the line of an error that says what is wrong; ITK's are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
