"""Image files in and out: what was not read faithfully is not read at all.

Patients' scans pass through here, so every doubt about a file is an error that says what to do; nothing is repaired
silently. In memory an image is a `MetaTensor` `(1, *shape)`, its affine maps voxel indices to RAS+ millimeters. The
readers behind are nibabel (NIfTI, FreeSurfer's MGH), MONAI's `ITKReader` (NRRD, MetaImage, DICOM, TIFF; needs `itk`)
and MONAI's `PILReader` (PNG, JPEG, BMP; needs Pillow).
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, ITKWriter, MetaTensor, PILReader
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys

__all__ = ["read_image", "read_label", "read_mask", "same_grid", "writable_folder", "write_image"]

_NIFTI = (".nii.gz", ".nii")
_NIBABEL = (*_NIFTI, ".mgz", ".mgh")
_META, _NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
_ITK = (*_META, *_NRRD, ".dcm", ".ima", ".tiff", ".tif")
_PIL = (".png", ".jpeg", ".jpg", ".bmp")
_READABLE = (*_NIBABEL, *_ITK, *_PIL)
_WRITABLE = (*_NIFTI, ".mha", ".nrrd")
_MILLIMETERS = {1: 1e3, 3: 1e-3}  # of NIfTI's meter and micron; any other code counts as millimeters, as in ITK

_SAME_GRID = 1e-2  # voxels; headers of 32 bits and of five decimals stay below, and no voxel changes its neighbor
_FLAT = 1e-3  # slope against the x-y plane that rounding of a header explains
_SLICE = 0.1  # slice distances by which a DICOM slice may be off an even stack; rounded positions stay below
_WHOLE = 1e-3  # by which a label may miss a whole number because its file scales the values
_BLOCK = 1 << 16

Source = str | os.PathLike[str] | MetaTensor | nib.spatialimages.SpatialImage | tuple[Any, Any]


class _Scan(NamedTuple):
    """An image as it was found: `what` names it in messages, `file` in the metadata of results."""

    values: np.ndarray  # (*shape), any type; may belong to the caller
    affine: np.ndarray  # (4, 4), voxel indices to RAS+ mm
    what: str
    file: str


def read_image(source: Source, role: str = "image", spatial_dims: int | None = None) -> MetaTensor:
    """Read an image and refuse what cannot be registered.

    Units other than millimeters and the value scaling of NIfTI are applied. NIfTI files that state no orientation lie
    where nibabel and MONAI put them. PNG, JPEG and BMP know no millimeters: a pixel is 1 mm, array axis 0 runs to the
    right of the picture. Checksums of compressed files are verified, which decompresses them twice.

    Args:
        source: a file, a folder with one DICOM series, a `MetaTensor` `(1, *shape)`, a nibabel image, or a pair of an
            array `(*shape)` and its affine, `(4, 4)` or `(D + 1, D + 1)`, to RAS+ mm. None of them is changed.
        role: what messages call the image, for example "moving image".
        spatial_dims: 2 or 3 to insist on so many axes; a volume of one slice in the x-y plane then counts as 2D. Any if
            left out. Axes of one voxel after the third are always dropped.

    Returns:
        The image `(1, *shape)`, float32; or float64 where float32 would overflow, change whole numbers or lose more
        than a millionth of the range. Its affine is `(4, 4)`, float64, also in 2D (where only the upper left 2 x 2 and
        the first two entries of the translation count), and `filename_or_obj` the path.

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
    if values.min() == values.max():
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
        takes for a mask when used as an index); affine and file name as from `read_image`.

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
        The mask `(1, *shape)`, bool, True inside; affine and file name as from `read_image`.

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
    suffix = _suffix(path, _WRITABLE)
    if suffix is None:
        raise ValueError(f"An image is written to a file ending in {', '.join(_WRITABLE)}, got '{path}'.")
    values, affine = _values_to_write(image, spatial_dims)
    if suffix not in _NIFTI:
        _import_itk(f"'{path}'")
        values = _for_itk(values, path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"An image is written to a file in a folder that exists, got '{path}'.")
    _require_writable(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        (_save_nifti if suffix in _NIFTI else _save_itk)(values, affine, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is ITK's
        code, reason = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or _reason(error)
        raise OSError(code, f"cannot write the image: {reason}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
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
    path = Path(path)
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


def _load(source: Source, role: str, spatial_dims: int | None) -> _Scan:
    """Open an image and bring it to the number of axes wanted; values and grid are checked for their kind."""
    if spatial_dims not in (None, 2, 3):
        raise ValueError(f"spatial_dims should be 2, 3 or None, got {spatial_dims!r}.")
    values, affine, what, file = _open(source, role)
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
        raise ValueError(f"The {what} is 2D, of shape {values.shape}: choose a 3D image, or register in 2D.")
    affine = _checked_affine(affine, values.ndim, what)
    if spatial_dims == 2 and values.ndim == 3:
        values, affine = _single_slice(values, affine, what)
    return _Scan(values, affine, what, file)


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


def _open(source: Source, role: str) -> _Scan:
    """Take an image from wherever it is, as it is."""
    if isinstance(source, MetaTensor):
        file = str(source.meta.get(ImageMetaKey.FILENAME_OR_OBJ) or "")
        what = _what(role, file)
        if source.dim() not in (3, 4) or source.shape[0] != 1:
            raise ValueError(
                f"The {what} should be a MetaTensor of shape (1, X, Y) or (1, X, Y, Z), got {tuple(source.shape)}: "
                "choose one channel, or add the channel axis."
            )
        affine = source.affine.numpy(force=True)
        if source.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS:
            affine = orientation_ras_lps(affine)
        return _Scan(_to_numpy(source.as_tensor()[0]), affine, what, file or _file_name(role))
    if isinstance(source, nib.spatialimages.SpatialImage):
        file = source.get_filename() or ""
        return _from_nibabel(source, _what(role, file), file or _file_name(role))
    if isinstance(source, tuple) and len(source) == 2:
        values, affine = (_to_numpy(part) for part in source)
        return _Scan(values, affine, role, _file_name(role))
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source).expanduser(), role)
    raise ValueError(
        f"The {role} should be a path, a MetaTensor, a nibabel image or a pair (array, affine), got "
        f"{type(source).__name__}."
    )


def _open_path(path: Path, role: str) -> _Scan:
    """Read a file or a folder with the reader that its suffix calls for."""
    what = _what(role, str(path))
    if path.is_dir():
        return _open_dicom(path, what)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"The {what} {problem}: check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"The {what} is an empty file of 0 bytes: copy or export it again.")
    if _suffix(path, _NIBABEL):
        return _open_nibabel(path, what)
    if _suffix(path, _ITK) or _is_dicom(path):
        return _open_itk(path, what)
    if _suffix(path, _PIL):
        return _open_picture(path, what)
    raise ValueError(f"The {what} has an unknown suffix: choose a file ending in {', '.join(_READABLE)}.")


def _open_nibabel(path: Path, what: str) -> _Scan:
    """Read a NIfTI or MGH file, its size and its raw header first: nibabel repairs a bad spacing without a word."""
    with _reading(what, "compressed" if path.name.lower().endswith("z") else "readable"):
        size = _content_size(path)
    kind: Any = nib.MGHImage
    if _suffix(path, _NIFTI):
        with _reading(what, "NIfTI"):
            kinds = [k for k in (nib.Nifti1Image, nib.Nifti2Image) if k.path_maybe_image(path)[0]]
        if not kinds:
            raise ValueError(f"The {what} is no NIfTI file, whatever its suffix says: export it again as NIfTI.")
        kind = kinds[0]
        with _reading(what, "NIfTI"), nib.openers.ImageOpener(str(path)) as stream:
            header = kind.header_class.from_fileobj(stream, check=False)
            rank, shape = int(header["dim"][0]), header.get_data_shape()
        if min(shape, default=1) < 1:
            raise ValueError(f"The {what} has an empty axis, its shape is {shape}: export it again.")
        spacing = header["pixdim"][1 : 1 + min(rank, 3)]
        if not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise ValueError(
                f"The {what} states a voxel spacing of {spacing.tolist()}: mend pixdim in its header, or export it "
                "again."
            )
    with _reading(what, "NIfTI" if kind is not nib.MGHImage else "MGH"):
        image = kind.from_filename(path, mmap=False)
        needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if size < needed:
        raise ValueError(f"The {what} is cut short, {size} bytes of {needed}: copy or export it again.")
    return _from_nibabel(image, what, str(path))


def _from_nibabel(image: Any, what: str, file: str) -> _Scan:
    """Take values and affine, in millimeters, from a nibabel image."""
    header, affine = image.header, image.affine
    affine = np.array(header.get_best_affine() if affine is None else affine, dtype=np.float64)
    if isinstance(image, nib.Nifti1Pair):
        rank = min(len(image.shape), 3)
        steps, spacing = np.linalg.norm(header.get_sform()[:3, :rank], axis=0), header["pixdim"][1 : 1 + rank]
        if header["sform_code"] > 0 and not np.allclose(steps, spacing, rtol=1e-3):
            raise ValueError(
                f"The {what} contradicts itself, with voxels of {spacing.tolist()} mm in pixdim and of "
                f"{steps.tolist()} mm in its sform: mend its header, or export it again."
            )
        affine[:3] *= _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
    with _reading(what, "an image"):
        values = np.asanyarray(image.dataobj)  # scaled; for an image in memory its own array
    return _Scan(values, affine, what, file)


def _open_itk(path: Path, what: str) -> _Scan:
    """Read a file through ITK, after its checksums and its kind: ITK returns noise for a damaged MetaImage."""
    itk = _import_itk(what)
    if _suffix(path, (*_META, *_NRRD)):
        with _reading(what, "an image"):
            _verify_text_header(path)
    with _reading(what, "an image"):
        header = _itk_header(itk, path)
    return _from_itk(itk, str(path), header, what, str(path))


def _is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, which often has no suffix, or a number for one."""
    with _reading(str(path), "a file"), path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _open_dicom(folder: Path, what: str) -> _Scan:
    """Read the one DICOM series of a folder whose slices form an even, upright stack."""
    itk = _import_itk(what)
    with _reading(what, "a DICOM series"), _quiet(itk):
        finder = itk.GDCMSeriesFileNames.New()
        finder.SetUseSeriesDetails(True)
        finder.AddSeriesRestriction("0008|0021")  # the date, as MONAI does
        finder.SetDirectory(str(folder))
        series = list(finder.GetSeriesUIDs())
        files = list(finder.GetFileNames(series[0])) if series else []
    if not files:
        raise ValueError(
            f"The {what} is a folder without a DICOM series: name an image file, or the folder of a series."
        )
    if len(series) > 1:
        raise ValueError(f"The {what} is a folder with {len(series)} DICOM series: move one to a folder of its own.")
    used = {Path(file).name for file in files}
    for file in sorted(folder.iterdir()):
        # ITK skips a slice that is cut short, and the rest may look like a series.
        if file.is_file() and file.name not in {*used, "DICOMDIR"} and (file.stat().st_size == 0 or _is_dicom(file)):
            raise ValueError(
                f"The {what} holds '{file.name}', which is damaged or no slice: copy it again or remove it."
            )
    with _reading(what, "a DICOM series"):
        headers = [_itk_header(itk, Path(file)) for file in files]
    with _quiet(itk):
        scan = _from_itk(itk, files if len(files) > 1 else files[0], headers[0], what, str(folder))
    if len(files) > 1:
        found = np.array([[header.GetOrigin(axis) for axis in range(3)] for header in headers]) * [-1, -1, 1]
        stack = scan.affine[:3, 3] + np.arange(len(files))[:, None] * scan.affine[:3, 2]
        off = np.linalg.norm(found - stack, axis=1).max() / np.linalg.norm(scan.affine[:3, 2])
        if not off <= _SLICE:
            raise ValueError(
                f"The {what} holds slices that form no even stack, up to {off:.2g} slice distances off (missing, "
                "double or tilted slices): complete the series, or resample it to an upright volume."
            )
    return scan


def _from_itk(itk: Any, names: str | Sequence[str], header: Any, what: str, file: str) -> _Scan:
    """Read what ITK's header has found to be scalar."""
    if header.GetNumberOfComponents() != 1:
        raise ValueError(
            f"The {what} holds {header.GetNumberOfComponents()} numbers per voxel (color, complex or vectors): convert "
            "it to one gray value per voxel."
        )
    # ITK for Python has no int8 and int64 images, and takes the type of a series from its first slice alone.
    lacking = [getattr(itk.CommonEnums, f"IOComponent_{name}") for name in ("CHAR", "LONG", "LONGLONG")]
    is_dicom = header.GetNameOfClass() == "GDCMImageIO"
    options = {"pixel_type": itk.D} if is_dicom or header.GetComponentType() in lacking else {}
    with _reading(what, "an image"):
        image = itk.imread(names, **options)
        values, meta = ITKReader().get_data(image)
    # The array is a view of ITK's memory.
    return _Scan(np.array(values), to_affine_nd(3, meta[MetaKeys.AFFINE]), what, file)


def _itk_header(itk: Any, path: Path) -> Any:
    """Return the ITK reader of a file, with its header read."""
    header = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise ValueError("no format that ITK knows")
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


def _open_picture(path: Path, what: str) -> _Scan:
    """Read a gray picture; one with a palette would be read as numbers of colors."""
    try:
        reader = PILReader()
    except ImportError as error:
        raise ImportError(f"The {what} needs Pillow: pip install pillow.") from error
    with _reading(what, "a picture"):
        picture = reader.read(str(path))
    if picture.mode not in ("1", "L", "I", "F") and not picture.mode.startswith("I;16"):
        raise ValueError(f"The {what} is in color (mode {picture.mode}): convert it to one gray value per pixel.")
    with _reading(what, "a picture"), picture:
        values, _ = reader.get_data(picture)
    return _Scan(values, np.eye(4), what, str(path))


def _content_size(path: Path) -> int:
    """Return the bytes in a file once decompressed; reading to the end makes gzip compare its checksum."""
    if not path.name.lower().endswith("z"):
        return path.stat().st_size
    with gzip.open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(_BLOCK), b""))


def _verify_text_header(path: Path) -> None:
    """Check what ITK passes over in a MetaImage or NRRD file, above all the checksum of compressed values."""
    meta = _suffix(path, _META) is not None
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        while line := stream.readline(_BLOCK).strip():
            key, _, value = line.decode("latin-1").partition("=" if meta else ":")
            fields[key.strip().lower().replace(" ", "")] = value.strip()
            if meta and "elementdatafile" in fields:
                break
        start = stream.tell()
    if meta and any("nan" in fields.get(key, "").lower() for key in ("offset", "position", "origin")):
        raise ValueError("its position is not a number")  # ITK takes it for 0
    if meta:
        compressed = fields.get("compresseddata", "")[:1] in ("T", "t", "1")
    else:
        compressed = fields.get("encoding", "").lower() in ("gzip", "gz")
    if not compressed:
        return
    name = fields.get("elementdatafile" if meta else "datafile", "LOCAL")
    file, start = (path, start) if name.upper() == "LOCAL" else (path.parent / name, 0)
    decoder = zlib.decompressobj(wbits=47)  # zlib's format or gzip's
    with file.open("rb") as stream:
        stream.seek(start)
        while not decoder.eof:
            block = stream.read(_BLOCK)
            if not block:
                raise EOFError("the compressed values end too early")
            decoder.decompress(block)


def _single_slice(values: np.ndarray, affine: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Drop the axis of a volume `(*shape)` that has one slice in the x-y plane; its step becomes the affine's third."""
    single = [axis for axis in (2, 1, 0) if values.shape[axis] == 1]
    if not single:
        raise ValueError(
            f"The {what} is 3D, of shape {values.shape}: choose a 2D image or a volume of one slice, or register in 3D."
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
    if not np.isfinite(double).all():
        return double
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


def _tensor(values: np.ndarray, scan: _Scan) -> MetaTensor:
    """Put values `(*shape)` that nobody else holds on the grid of a scan."""
    meta = {ImageMetaKey.FILENAME_OR_OBJ: scan.file, MetaKeys.SPACE: SpaceKeys.RAS}
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(values))[None], affine=torch.from_numpy(scan.affine.copy()), meta=meta
    )


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


def _for_itk(values: np.ndarray, path: Path) -> np.ndarray:
    """Replace integers of 8 bits with a sign and of 64 bits, of which ITK for Python has no images."""
    if values.dtype not in (np.int8, np.int64, np.uint64):
        return values
    low, high = int(values.min()), int(values.max())
    for kind in (np.int16, np.int32, np.uint32) if values.dtype == np.int8 else (np.int32, np.uint32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    if max(high, -low) > 2**53:
        raise ValueError(f"'{path}' cannot hold integers such as {max(high, -low)}: write a .nii.gz file instead.")
    return values.astype(np.float64)


def _save_nifti(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write values `(*shape)` with both orientations alike, or the one that can hold a shear."""
    kind = nib.Nifti1Image if max(values.shape) < 2**15 else nib.Nifti2Image
    image = kind(values, affine, dtype=values.dtype)
    image.set_sform(affine, code=1)
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(unit.T @ unit - np.eye(3)).max() < 1e-3:
        image.set_qform(affine, code=1)  # with shear, ITK would read it in place of the sform and be wrong silently
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _save_itk(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write values `(*shape)` through MONAI and ITK, compressed."""
    import itk

    dims = values.ndim
    grid = np.eye(dims + 1)
    grid[:dims, :dims], grid[:dims, dims] = affine[:dims, :dims], affine[:dims, 3]
    image = ITKWriter.create_backend_obj(values, channel_dim=None, affine=grid, dtype=values.dtype)
    itk.imwrite(image, str(path), compression=True)


def _to_numpy(array: Any) -> np.ndarray:
    """Return an array that may share memory with a tensor; floating point types that numpy lacks become float32."""
    if isinstance(array, torch.Tensor):
        array = array.as_tensor() if isinstance(array, MetaTensor) else array
        if array.is_floating_point() and array.element_size() < 4:
            array = array.to(torch.float32)
        return array.detach().cpu().numpy()
    return np.asanyarray(array)


def _import_itk(what: str) -> Any:
    """Import ITK when a file needs it."""
    try:
        import itk
    except ImportError as error:
        raise ImportError(f"{what} needs ITK: pip install itk, or use NIfTI files.") from error
    return itk


@contextmanager
def _quiet(itk: Any) -> Iterator[None]:
    """Keep ITK from printing warnings about what is an error here."""
    shown = itk.Object.GetGlobalWarningDisplay()
    itk.Object.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        itk.Object.SetGlobalWarningDisplay(shown)


@contextmanager
def _reading(what: str, kind: str) -> Iterator[None]:
    """Turn whatever a reader raises about a damaged or foreign file into one sentence; they raise nearly anything."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"The {what} cannot be read as {kind} ({_reason(error)}): copy or export it again, with the right suffix."
        ) from error


def _reason(error: Exception) -> str:
    """Return the end of an error message, where ITK says what happened, in one line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"... {text[-200:]}"


def _suffix(path: Path, suffixes: Sequence[str]) -> str | None:
    """Return which of these a file name ends in; a name that is nothing else does not count."""
    name = path.name.lower()
    return next((suffix for suffix in suffixes if name.endswith(suffix) and name != suffix), None)


def _what(role: str, file: str) -> str:
    """Return what messages call an image."""
    return f"{role} '{file}'" if file else role


def _file_name(role: str) -> str:
    """Return what stands for the file of an image that was never in one."""
    return role.replace(" ", "_")


def _grid_text(image: MetaTensor) -> str:
    """Describe a grid in one line."""
    return f"shape {tuple(image.shape[1:])} and affine {image.affine.numpy(force=True).round(4).tolist()}"
