"""Image files in and out: what was not read faithfully is not read at all.

Patients' scans pass through here, so every doubt about a file is an error that says what to do; nothing is repaired
silently. In memory an image is a `MetaTensor` `(1, *shape)`, its affine maps voxel indices to RAS+ millimeters. The
readers behind are nibabel (NIfTI, FreeSurfer's MGH), MONAI's `ITKReader` (NRRD, MetaImage, DICOM, TIFF; needs `itk`)
and MONAI's `PILReader` (PNG, JPEG, BMP; needs Pillow).
"""

from __future__ import annotations

import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys

from ._image_files import WRITABLE, Scan, from_nibabel, open_path, save, storable, suffix_of

__all__ = ["read_image", "read_label", "read_mask", "same_grid", "writable_folder", "write_image"]

_SAME_GRID = 1e-2  # voxels; headers of 32 bits and of five decimals stay below, and no voxel changes its neighbor
_FLAT = 1e-3  # slope against the x-y plane that rounding of a header explains
_WHOLE = 1e-3  # by which a label may miss a whole number because its file scales the values
_UNPLACED = "unplaced"  # entry of the metadata

Source = str | os.PathLike[str] | MetaTensor | nib.spatialimages.SpatialImage | tuple[Any, Any]


def read_image(
    source: Source, role: str = "image", spatial_dims: int | None = None, constant: bool = False
) -> MetaTensor:
    """Read an image and refuse what cannot be registered.

    Units other than millimeters and the value scaling of NIfTI are applied. PNG, JPEG and BMP know no millimeters: a
    pixel is 1 mm, array axis 0 runs to the right of the picture. Checksums of compressed files are verified, which
    decompresses them twice.

    Programs disagree where a NIfTI file lies whose sform and qform codes are both 0. In nibabel, MONAI and here its
    center is the origin of the world and array axis 1 runs to the front; in ITK the first voxel is, and it runs back.

    Args:
        source: a file, a folder with one DICOM series, a `MetaTensor` `(1, *shape)`, a nibabel image, or a pair of an
            array `(*shape)` and its affine, `(4, 4)` or `(D + 1, D + 1)`, to RAS+ mm. None of them is changed.
        role: what messages call the image, for example "moving image".
        spatial_dims: 2 or 3 to insist on so many axes; a volume of one slice in the x-y plane then counts as 2D. Any if
            left out. Axes of one voxel after the third are always dropped.
        constant: take an image with one value everywhere, too, of which the grid alone counts.

    Returns:
        The image `(1, *shape)`, float32; or float64 where float32 would overflow, change whole numbers or lose more
        than a millionth of the range. Its affine is `(4, 4)`, float64, also in 2D (where only the upper left 2 x 2 and
        the first two entries of the translation count). In the metadata `filename_or_obj` is the path, and `unplaced`
        is True if both codes of a NIfTI file are 0, and missing otherwise.

    Raises:
        ValueError: one sentence that names the image and says what to do: if it is missing, damaged, cut short, of
            another format, a series, in color, complex, empty, constant, or not finite; if its grid is singular, states
            no spacing, contradicts itself, or does not have `spatial_dims` axes.
        ImportError: if the format needs a package that is not installed.

    Reference: the NIfTI-1 header, https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h.

    Example:
        >>> image = read_image((np.arange(6).reshape(2, 3), np.diag([-2.0, 2.0, 1.0])), role="fixed image")
        >>> image.shape, image.dtype, image.affine.diagonal().tolist()
        (torch.Size([1, 2, 3]), torch.float32, [-2.0, 2.0, 1.0, 1.0])
    """
    scan = _load(source, role, spatial_dims)
    values = _floating(scan.values)
    _require_finite(values, scan.what)
    if values.min() == values.max() and not constant:
        raise ValueError(
            f"The {scan.what} is {values.min():g} everywhere, which leaves nothing to register: choose another file."
        )
    return _tensor(values, scan)


def read_label(
    source: Source, role: str = "label", like: MetaTensor | None = None, spatial_dims: int | None = None
) -> MetaTensor:
    """Read a label map: whole numbers, on the grid of its image.

    Args:
        source: as for `read_image`.
        role: what messages call the label map, for example "moving label".
        like: image `(C, *shape)` whose grid the label map must have, in the sense of `same_grid`; its number of axes
            takes the place of `spatial_dims`.
        spatial_dims: as for `read_image`.

    Returns:
        The label map `(1, *shape)`, in the smallest of int16, int32 and int64 that holds it (never uint8, which torch
        takes for a mask when used as an index); affine and metadata as from `read_image`.

    Raises:
        ValueError: if a value is not whole, the grids differ, or for whatever `read_image` refuses; a label map may be
            constant.
        ImportError: as for `read_image`.

    Example:
        >>> read_label((np.array([[0.0, 3.0]]), np.eye(3))).dtype
        torch.int16
    """
    return _label(source, role, like, spatial_dims)[0]


def read_mask(
    source: Source, role: str = "mask", like: MetaTensor | None = None, spatial_dims: int | None = None
) -> MetaTensor:
    """Read a mask: a label map in which all that is not 0 is inside.

    Args:
        source: as for `read_image`.
        role: what messages call the mask, for example "fixed mask".
        like: as for `read_label`.
        spatial_dims: as for `read_image`.

    Returns:
        The mask `(1, *shape)`, bool, True inside; affine and metadata as from `read_image`.

    Raises:
        ValueError: if nothing is inside, or for whatever `read_label` refuses.
        ImportError: as for `read_image`.

    Example:
        >>> read_mask((np.array([[0, 3]]), np.eye(3))).tolist()
        [[[False, True]]]
    """
    label, what = _label(source, role, like, spatial_dims)
    mask = MetaTensor(label.as_tensor() != 0, meta=label.meta)
    if not bool(mask.any()):
        raise ValueError(f"The {what} is 0 everywhere: mark the voxels inside with 1.")
    return mask


def same_grid(a: MetaTensor, b: MetaTensor) -> bool:
    """Tell whether two images have the same shape and their voxels lie in the same places.

    The places agree if no corner voxel of `a` lies more than 0.01 voxels of `b` off the same corner of `b`: rounding of
    headers stays below that, and what it moves a label by is far from half a voxel.

    Args:
        a: image `(C, *shape)`, 2D or 3D.
        b: image `(C, *shape)`; channels do not count.

    Returns:
        True if the grids agree.

    Raises:
        ValueError: if an image is not 2D or 3D, or its affine is singular or, in 2D, leaves the x-y plane.

    Example:
        >>> a = MetaTensor(torch.zeros(1, 100, 100), affine=torch.eye(4))
        >>> b = MetaTensor(torch.zeros(1, 100, 100), affine=torch.diag(torch.tensor([1.001, 1.0, 1.0, 1.0])))
        >>> same_grid(a, a), same_grid(a, b)
        (True, False)
    """
    dims = a.dim() - 1
    affines = [
        _checked_affine(image.affine, image.dim() - 1, f"{name} image") for image, name in ((a, "first"), (b, "second"))
    ]
    if a.shape[1:] != b.shape[1:]:
        return False
    (steps, origin), (other_steps, other_origin) = [(affine[:dims, :dims], affine[:dims, 3]) for affine in affines]
    corners = np.array(list(product(*((0, size - 1) for size in a.shape[1:])))).T  # (D, 2**D)
    gap = (steps - other_steps) @ corners + (origin - other_origin)[:, None]
    return bool(np.linalg.norm(np.linalg.solve(other_steps, gap), axis=0).max() <= _SAME_GRID)


def write_image(image: MetaTensor, path: str | os.PathLike[str], spatial_dims: int | None = None) -> Path:
    """Write an image to a file that nibabel, ITK and MONAI read as the same voxels in the same places.

    The file appears whole or not at all: a failure leaves neither a broken file nor a temporary one, and a file that
    was there before stays. Values keep their type, except that bool becomes uint8 and halves float32. NRRD and
    MetaImage hold int8 as int16, and integers of 64 bits as ones of 32 or, where those are too small, as float64.

    Args:
        image: `(1, *shape)` or `(*shape)`, 2D or 3D, its affine to RAS+ mm; it is not changed. Three axes of which the
            first has one voxel count as a 2D image with a channel axis.
        path: file to write in a folder that exists, ending in `.nii`, `.nii.gz`, `.mha` or `.nrrd`.
        spatial_dims: 2 or 3, the number of axes without the channel axis, to decide what the shape leaves open.

    Returns:
        The path written.

    Raises:
        ValueError: if the image is not such a tensor, is complex, empty or has a singular affine; if the path ends
            otherwise or is a folder, or its folder does not exist or refuses writing; if `.mha` and `.nrrd` cannot hold
            the integers.
        ImportError: if `itk` is missing and the file is not NIfTI.
        OSError: if writing fails, for example on a full disk.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_image(MetaTensor(torch.ones(1, 4, 5), affine=torch.eye(4)), Path(folder, "image.nii"))
        ...     nib.load(path).shape
        (4, 5)
    """
    path = Path(path)
    if suffix_of(path, WRITABLE) is None:
        raise ValueError(f"An image is written to a file ending in {', '.join(WRITABLE)}, got '{path}'.")
    values, affine = _values_to_write(image, spatial_dims)
    values = storable(values, path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"An image is written to a file in a folder that exists, got '{path}'.")
    _require_writable(path.parent)
    save(values, affine, path)
    return path


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder, with those above it, unless it exists, and check that files can be written to it.

    Args:
        path: the folder.

    Returns:
        Its path.

    Raises:
        ValueError: if something else has this name, or it cannot be created or written to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writable_folder(Path(folder, "new", "results")).name
        'results'
    """
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The folder '{path}' cannot be created ({error.strerror}): choose another one.") from error
    _require_writable(path)
    return path


def _require_writable(folder: Path) -> None:
    """Refuse a folder that takes no files; only trying tells, as permissions say nothing to root or about a mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"The folder '{folder}' cannot be written to ({error.strerror}): choose another one."
        ) from error


def _load(source: Source, role: str, spatial_dims: int | None) -> Scan:
    """Open an image and bring it to the number of axes wanted; values and grid are checked for their kind."""
    if spatial_dims not in (None, 2, 3):
        raise ValueError(f"spatial_dims should be 2, 3 or None, got {spatial_dims!r}.")
    scan = _open(source, role)
    values, what = scan.values, scan.what
    if values.dtype.names:
        raise ValueError(f"The {what} is in color: convert it to one gray value per voxel.")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"The {what} holds {values.dtype} values: convert it to real numbers, such as the magnitude.")
    if 0 in values.shape:
        raise ValueError(f"The {what} has an empty axis, its shape is {values.shape}: export it again.")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim > 3:
        raise ValueError(
            f"The {what} has shape {values.shape}, a series of volumes or of components: save one of them to a file of "
            "its own."
        )
    if values.ndim < 2:
        raise ValueError(f"The {what} has shape {values.shape}: choose an image with two or three axes.")
    if spatial_dims == 3 and values.ndim == 2:
        raise ValueError(
            f"The {what} is 2D, of shape {values.shape}: choose a 3D image, or register in 2D, with weights such as "
            "vessels."
        )
    affine = _checked_affine(scan.affine, values.ndim, what)
    if spatial_dims == 2 and values.ndim == 3:
        values, affine = _single_slice(values, affine, what)
    return scan._replace(values=values, affine=affine)


def _open(source: Source, role: str) -> Scan:
    """Take an image from wherever it is, as it is."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return open_path(path, f"{role} '{path}'")
    file = ""
    if isinstance(source, MetaTensor):
        file = str(source.meta.get(ImageMetaKey.FILENAME_OR_OBJ) or "")
    elif isinstance(source, nib.spatialimages.SpatialImage):
        file = source.get_filename() or ""
    what = f"{role} '{file}'" if file else role
    file = file or role.replace(" ", "_")  # for what was never in a file
    if isinstance(source, MetaTensor):
        return _from_tensor(source, what, file)
    if isinstance(source, nib.spatialimages.SpatialImage):
        return from_nibabel(source, what, file)
    if isinstance(source, tuple) and len(source) == 2:
        return Scan(_to_numpy(source[0]), _to_numpy(source[1]), what, file)
    raise ValueError(
        f"The {role} should be a path, a MetaTensor, a nibabel image or a pair (array, affine), got "
        f"{type(source).__name__}."
    )


def _from_tensor(image: MetaTensor, what: str, file: str) -> Scan:
    """Take the one channel of a tensor and its affine, which MONAI may keep to LPS+."""
    if image.dim() not in (3, 4) or image.shape[0] != 1:
        raise ValueError(
            f"The {what} should be a MetaTensor of shape (1, X, Y) or (1, X, Y, Z), got {tuple(image.shape)}: choose "
            "one channel, or add the channel axis."
        )
    affine = image.affine.numpy(force=True)
    if image.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS:
        affine = orientation_ras_lps(affine)
    return Scan(_to_numpy(image.as_tensor()[0]), affine, what, file, bool(image.meta.get(_UNPLACED)))


def _label(source: Source, role: str, like: MetaTensor | None, spatial_dims: int | None) -> tuple[MetaTensor, str]:
    """Return the label map of `read_label`, and what messages call it."""
    scan = _load(source, role, like.dim() - 1 if like is not None else spatial_dims)
    values = scan.values
    _require_finite(values, scan.what)
    if values.dtype.kind not in "biu":
        values = _whole(values, scan.what)
    low, high = int(values.min()), int(values.max())
    kind = next((k for k in (np.int16, np.int32, np.int64) if np.iinfo(k).min <= low and high <= np.iinfo(k).max), None)
    if kind is None:
        raise ValueError(f"The {scan.what} holds values such as {max(high, -low)}: number its labels below 2**63.")
    label = _tensor(values.astype(kind), scan)
    if like is not None and not same_grid(label, like):
        raise ValueError(
            f"The {scan.what} lies on another grid, {_grid_text(label)}, than its image, {_grid_text(like)}: resample "
            "it to that grid with nearest neighbor interpolation, or mend its header."
        )
    return label, scan.what


def _single_slice(values: np.ndarray, affine: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Drop the axis of a volume `(*shape)` that has one slice in the x-y plane; its step becomes the affine's third."""
    single = [axis for axis in (2, 1, 0) if values.shape[axis] == 1]
    if not single:
        raise ValueError(
            f"The {what} is 3D, of shape {values.shape}: choose a 2D image or a volume of one slice, or register in "
            "3D, with weights such as brain."
        )
    for axis in single:
        kept = [i for i in range(3) if i != axis]
        if _is_flat(affine[:3, kept]):
            return values.squeeze(axis), affine[:, [*kept, axis, 3]]
    raise ValueError(f"The {what} is one slice that does not lie in the x-y plane: register in 3D, or mend its header.")


def _is_flat(steps: np.ndarray) -> bool:
    """Tell whether two steps `(3, 2)`, in columns, lie in the x-y plane."""
    return bool((np.abs(steps[2]) <= _FLAT * np.linalg.norm(steps, axis=0)).all())


def _checked_affine(affine: Any, dims: int, what: str) -> np.ndarray:
    """Return the affine of a grid as `(4, 4)` float64, or refuse it; shear is let through."""
    given = _to_numpy(affine)
    if dims not in (2, 3) or given.shape not in ((4, 4), (dims + 1, dims + 1)) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"The {what} should have two or three axes and an affine of shape (4, 4), got {dims} axes and an affine of "
            f"shape {given.shape}."
        )
    full = given.astype(np.float64)
    if len(full) == 3:
        full = to_affine_nd(3, full)
    steps = full[:dims, :dims]
    lengths = np.linalg.norm(full[:3, :dims], axis=0)
    if not np.isfinite(full).all() or not lengths.min() > 0 or not np.array_equal(full[3], (0, 0, 0, 1)):
        raise ValueError(
            f"The {what} has the affine {full.tolist()}, which should be finite, with positive spacing and a last row "
            "of 0, 0, 0, 1: mend its header."
        )
    if dims == 2 and not _is_flat(full[:3, :2]):
        raise ValueError(f"The {what} is 2D but does not lie in the x-y plane, got {full.tolist()}: mend its header.")
    if not abs(np.linalg.det(steps / lengths)) > 1e-6:
        raise ValueError(f"The {what} has the affine {full.tolist()}, which is singular: mend its header.")
    return full


def _require_finite(values: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity."""
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"The {what} holds {bad} of {values.size} values that are NaN or infinite: repair it, for example by "
            "numpy.nan_to_num."
        )


def _floating(values: np.ndarray) -> np.ndarray:
    """Copy real numbers to float32 or, where that is not faithful, to float64."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        if values.dtype.kind == "b" or values.dtype.itemsize <= 2 or values.dtype.newbyteorder("=") == np.float32:
            return single
        double = values.astype(np.float64)
    if not np.isfinite(single).all():
        return double
    error = np.abs(double - single).max()
    allowed = 0.0 if (double == np.rint(double)).all() else 1e-6 * double.max() - 1e-6 * double.min()
    return single if error <= allowed else double


def _whole(values: np.ndarray, what: str) -> np.ndarray:
    """Round labels that were stored as floating point numbers to int64, or refuse them."""
    double = values.astype(np.float64)
    whole = np.rint(double)
    wrong = (np.abs(double - whole) > _WHOLE) | (np.abs(double) >= 2.0**63)
    if wrong.any():
        raise ValueError(
            f"The {what} holds values such as {double[wrong][0]:g}; is it an image rather than a label map? Choose a "
            "file of whole numbers."
        )
    return whole.astype(np.int64)


def _tensor(values: np.ndarray, scan: Scan) -> MetaTensor:
    """Put values `(*shape)` that nobody else holds on the grid of a scan."""
    meta: dict[str, Any] = {ImageMetaKey.FILENAME_OR_OBJ: scan.file, MetaKeys.SPACE: SpaceKeys.RAS}
    if scan.unplaced:
        meta[_UNPLACED] = True
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None]
    return MetaTensor(tensor, affine=torch.from_numpy(scan.affine.copy()), meta=meta)


def _values_to_write(image: MetaTensor, spatial_dims: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the values `(*shape)` of an image, in a type that files know, and its affine."""
    if not isinstance(image, MetaTensor):
        raise ValueError(f"write_image expects a MetaTensor, whose affine places it, got {type(image).__name__}.")
    has_channel = image.dim() == 4 or (image.dim() == 3 and image.shape[0] == 1)
    if spatial_dims is not None:
        has_channel = image.dim() == spatial_dims + 1
    dims = image.dim() - has_channel
    wrong_shape = dims not in (2, 3) or spatial_dims not in (None, dims) or (has_channel and image.shape[0] != 1)
    if wrong_shape or 0 in image.shape or image.is_complex():
        raise ValueError(
            "write_image expects real values of shape (1, X, Y), (1, X, Y, Z) or the same without the channel axis, "
            f"got {image.dtype} of shape {tuple(image.shape)} and spatial_dims={spatial_dims}."
        )
    affine = _checked_affine(image.affine, dims, "image to write")
    if dims == 2:
        affine[:3, 2], affine[2, :2] = (0.0, 0.0, 1.0), 0.0  # the axis it lacks is that of the world
    values = image.as_tensor()[0] if has_channel else image.as_tensor()
    if values.dtype == torch.bool:
        values = values.to(torch.uint8)
    return _to_numpy(values), affine


def _to_numpy(array: Any) -> np.ndarray:
    """Return an array that may share memory with a tensor; floating point types that numpy lacks become float32."""
    if isinstance(array, torch.Tensor):
        array = array.as_tensor() if isinstance(array, MetaTensor) else array
        if array.is_floating_point() and array.element_size() < 4:
            array = array.to(torch.float32)
        return array.detach().cpu().numpy()
    return np.asanyarray(array)


def _grid_text(image: MetaTensor) -> str:
    """Describe a grid in one line."""
    return f"shape {tuple(image.shape[1:])} and affine {image.affine.numpy(force=True).round(4).tolist()}"
