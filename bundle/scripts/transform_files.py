"""Transforms as files that ITK, SimpleITK and ANTs read and write.

In memory a transform is a list of steps, see `equireg.world`: affines on RAS+ millimeters and displacement fields.
Files hold LPS+ millimeters. This module turns one into the other with ITK for Python, an extra (`pip install itk`);
only NIfTI fields do without.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_tensor

from .atomic import written_whole
from .blocks import blocks, is_finite
from .io import itk_grid_affine, read_displacement_field, write_displacement_field
from .spaces import world_matrix
from .world import as_field, field_affine

__all__ = ["read_affine", "read_transform", "write_affine", "write_transform"]

_NIFTI = (".nii", ".nii.gz")
_IMAGES = (".nrrd", ".nhdr", ".mha", ".mhd")
_WITH_FIELDS = (".h5", ".hdf5")
_AFFINES = (".tfm", ".mat", *_WITH_FIELDS)
_TRANSFORMS = (".txt", *_AFFINES)


def read_transform(path: str | os.PathLike[str]) -> list[torch.Tensor]:
    """Read a transform that any program wrote with ITK.

    Args:
        path: a displacement field (`.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`), or an ITK transform file
            (`.tfm`, `.txt`, `.mat`, `.h5`, `.hdf5`) that holds a linear transform, a displacement field, or a
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
            # ITK's own choice of a pixel type cannot be read where components are of double precision.
            image = itk.imread(os.fspath(path), pixel_type=itk.VariableLengthVector[itk.D])
            return [_field(itk, image, path)]
        _require_whole(path, suffix)
        found = _transforms(itk, path, suffix)
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, zlib.error) as error:
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
        path: file to write, in a folder that exists: `.nii` or `.nii.gz` for one displacement field; `.mat` for one
            affine; `.tfm` for affines; `.h5` or `.hdf5` for anything.

    Returns:
        The path written; the file appears whole or not at all.

    Raises:
        ValueError: if there is no step or one is none, if their numbers of axes differ, or if the path ends otherwise
            or its folder does not exist.
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
    axes = {step.dim() - 1 if isinstance(step, MetaTensor) else len(step) - 1 for step in transform}
    if len(axes) > 1:
        raise ValueError(f"the steps of '{path}' should have one number of axes, got {sorted(axes)}.")
    if suffix in _NIFTI:
        if len(transform) != 1 or not fields:
            raise ValueError(f"'{path}' holds one displacement field; chain the steps into one, or write them as .h5.")
        return write_displacement_field(fields[0], fields[0].affine, path)
    if fields and suffix not in _WITH_FIELDS:
        raise ValueError(f"a displacement field is written as .nii.gz or .h5, not as '{path}'.")
    if suffix == ".mat" and len(transform) > 1:  # ITK would write it, and not read it again
        raise ValueError(f"'{path}' holds one affine; multiply the steps into one, or write them as .tfm or .h5.")
    itk = _itk(path)
    steps = [_to_itk(itk, step) for step in transform]
    whole = steps[0]
    if len(steps) > 1:
        whole = itk.CompositeTransform[itk.D, steps[0].GetInputSpaceDimension()].New()
        for step in reversed(steps):  # points pass through the transform that was added last first
            whole.AddTransform(step)
    with written_whole(path, "transform", _reason) as temporary:
        _write(itk, whole, os.fspath(temporary), suffix)
    return path


def _transforms(itk: Any, path: Path, suffix: str) -> list[Any]:
    """Read an ITK transform file; ITK for Python does not know the general affine of ANTs by its name."""
    if suffix in _WITH_FIELDS:
        return itk.transformread(os.fspath(path))
    data = path.read_bytes()
    pad = bytes(1) if suffix == ".mat" else b" "  # the length of a name is part of MATLAB files
    known = re.sub(
        rb"MatrixOffsetTransformBase(_\w+?_\d_\d)", lambda m: (b"AffineTransform" + m[1]).ljust(len(m[0]), pad), data
    )
    if known == data:
        return itk.transformread(os.fspath(path))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, f"affine{suffix}")
        copy.write_bytes(known)
        return itk.transformread(os.fspath(copy))


def _steps(itk: Any, transform: Any, path: Path) -> list[torch.Tensor]:
    """Turn an ITK transform into steps."""
    transform = itk.down_cast(transform)
    kind = transform.GetNameOfClass()
    if kind == "CompositeTransform":
        parts = [transform.GetNthTransform(i) for i in range(transform.GetNumberOfTransforms())]
        steps = [step for part in reversed(parts) for step in _steps(itk, part, path)]
        return steps or [torch.eye(transform.GetInputSpaceDimension() + 1, dtype=torch.float64)]
    if kind.endswith("DisplacementFieldTransform"):  # some smooth their updates, and move points alike
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
    if image is None:
        raise ValueError(f"the displacement field '{path}' has no values; the file may end early.")
    dims = image.GetImageDimension()
    values = itk.array_view_from_image(image)
    if values.ndim != dims + 1 or values.shape[-1] != dims or dims not in (2, 3):
        raise ValueError(
            f"'{path}' should hold D components at each voxel of a grid of D = 2 or 3 axes, got "
            f"{list(values.shape)} on {dims} axes."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the displacement field '{path}' holds NaN or infinity.")
    grid = np.eye(dims + 1)
    direction = itk.array_from_matrix(image.GetDirection())
    grid[:dims, :dims] = direction * np.array(list(image.GetSpacing()))
    grid[:dims, dims] = list(image.GetOrigin())
    to_voxels = np.linalg.inv(grid[:dims, :dims])  # both sides in LPS+
    ddf = torch.empty(values.T.shape)
    for where in blocks(ddf.shape[1:]):
        ddf[where] = torch.from_numpy(np.einsum("ij,j...->i...", to_voxels, values.T[where], dtype=np.float64)).float()
    return as_field(ddf, _flip(dims) @ grid)


def _to_itk(itk: Any, step: torch.Tensor) -> Any:
    """Turn a step into an ITK transform of double precision."""
    if not isinstance(step, MetaTensor):
        dims = len(step) - 1
        linear = world_matrix(step.detach(), dims)
        if step[-1].tolist() != linear[-1].tolist():
            raise ValueError(f"the last row of an affine should be {linear[-1].tolist()}, got {step[-1].tolist()}.")
        matrix = _flip(dims) @ linear.numpy() @ _flip(dims)
        affine = itk.AffineTransform[itk.D, dims].New()
        affine.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:dims, :dims])))
        affine.SetTranslation(matrix[:dims, dims].tolist())
        return affine
    dims = step.dim() - 1
    values = convert_to_tensor(step, track_meta=False).detach().cpu()
    if step.shape[0] != dims or not is_finite(values):
        raise ValueError(f"expected a finite displacement field (D, *shape) with D = 2 or 3, got {list(step.shape)}.")
    itk_grid_affine(step.affine, dims)
    grid = _flip(dims) @ field_affine(step).numpy()
    spacing = np.linalg.norm(grid[:dims, :dims], axis=0)
    image = itk.Image[itk.Vector[itk.D, dims], dims].New()
    image.SetRegions(list(step.shape[1:]))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(grid[:dims, dims].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(grid[:dims, :dims] / spacing)))
    image.Allocate()
    millimeters = itk.array_view_from_image(image).T  # (D, *shape)
    for where in blocks(step.shape[1:]):
        millimeters[where] = np.einsum("ij,j...->i...", grid[:dims, :dims], values[where].double().numpy())
    field = itk.DisplacementFieldTransform[itk.D, dims].New()
    field.SetDisplacementField(image)
    return field


def _flip(dims: int) -> np.ndarray:
    """Return the matrix `(D + 1, D + 1)` that turns points of RAS+ into points of LPS+, and back."""
    return np.diag([*(-1.0, -1.0, 1.0)[:dims], 1.0])


def _write(itk: Any, transform: Any, name: str, suffix: str) -> None:
    """Write an ITK transform; of text and MATLAB files, in which ITK overlooks a full disk, read what was written."""
    itk.transformwrite([transform], name, compression=suffix in _WITH_FIELDS)
    if suffix in _WITH_FIELDS:
        return
    _require_whole(Path(name), suffix)
    (again,) = itk.transformread(name)
    for get in ("GetParameters", "GetFixedParameters"):
        if not np.array_equal(np.array(getattr(again, get)()), np.array(getattr(transform, get)())):
            raise RuntimeError("the file does not hold what was written")


def _require_whole(path: Path, suffix: str) -> None:
    """Refuse text and MATLAB files that end early: ITK makes up what is missing, or reads on forever."""
    if suffix in (".tfm", ".txt"):
        tags = [line.partition(b":") for line in path.read_bytes().splitlines()]
        kinds = [value for tag, _, value in tags if tag.strip() == b"Transform"]
        expected = sum(b"CompositeTransform" not in kind for kind in kinds)
        counts = {name: sum(tag.strip() == name for tag, _, _ in tags) for name in (b"Parameters", b"FixedParameters")}
        if not kinds or any(count != expected for count in counts.values()):
            raise RuntimeError("it is no ITK transform, or ends early")
    elif suffix == ".mat" and not _is_whole_matlab(path.read_bytes()):
        raise RuntimeError("it is no ITK transform in MATLAB format 4, or ends early")


def _is_whole_matlab(data: bytes) -> bool:
    """Follow the arrays of a MATLAB file of format 4 to its end; ITK writes two for each transform.

    Reference: MAT-File Format, chapter 2, https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf.
    """
    position = count = 0
    while position + 20 <= len(data):
        order = "<" if data[position + 2 : position + 4] == bytes(2) else ">"  # the first number is below 10000
        kind, rows, columns, imaginary, name = struct.unpack_from(f"{order}5i", data, position)
        size = {0: 8, 1: 4}.get(kind // 10 % 10)  # double or single precision
        if size is None or imaginary or min(rows, columns, name) < 0:
            return False
        position += 20 + name + rows * columns * size
        count += 1
    return position == len(data) and count > 0 and count % 2 == 0


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
    if lines and lines[-1].startswith("[nrrd]"):
        return lines[-1]
    named = [re.sub(r"^ITK ERROR: (\w+\(\w+\): )?", "", line) for line in lines if line.startswith("ITK ERROR")]
    return (named or lines or [type(error).__name__])[0]
