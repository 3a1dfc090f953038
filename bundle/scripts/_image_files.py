"""Image files of each format: opened with whatever library knows it, verified where that one is lenient, and saved.

The libraries are nibabel (NIfTI, FreeSurfer's MGH), ITK with MONAI's `ITKReader` (NRRD, MetaImage, DICOM, TIFF) and
MONAI's `PILReader` (PNG, JPEG, BMP). What an image must be to be registered is the concern of `images.py`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data import ITKReader, ITKWriter, PILReader
from monai.data.utils import to_affine_nd
from monai.utils import MetaKeys

from .atomic import written_whole

__all__ = ["WRITABLE", "Scan", "from_nibabel", "open_path", "save", "storable", "suffix_of"]

_NIFTI = (".nii.gz", ".nii")
_NIBABEL = (*_NIFTI, ".mgz", ".mgh")
_META, _NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
_ITK = (*_META, *_NRRD, ".dcm", ".ima", ".tiff", ".tif")
_PIL = (".png", ".jpeg", ".jpg", ".bmp")
_READABLE = (*_NIBABEL, *_ITK, *_PIL)
WRITABLE = (*_NIFTI, ".mha", ".nrrd")

_MILLIMETERS = {1: 1e3, 3: 1e-3}  # of NIfTI's meter and micron; any other code counts as millimeters, as in ITK
_SLICE = 0.1  # slice distances by which a DICOM slice may be off an even stack; rounded positions stay below
_BLOCK = 1 << 16


class Scan(NamedTuple):
    """An image as it was found: `what` names it in messages, `file` in the metadata of results."""

    values: np.ndarray  # (*shape), any type; may belong to the caller
    affine: np.ndarray  # (4, 4), voxel indices to RAS+ mm
    what: str
    file: str
    unplaced: bool = False  # the file does not say where it lies


def open_path(path: Path, what: str) -> Scan:
    """Read a file or a folder with the reader that its suffix calls for."""
    if path.is_dir():
        return _open_dicom(path, what)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"The {what} {problem}: check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"The {what} is an empty file of 0 bytes: copy or export it again.")
    if suffix_of(path, _NIBABEL):
        return _open_nibabel(path, what)
    if suffix_of(path, _ITK) or _is_dicom(path):
        return _open_itk(path, what)
    if suffix_of(path, _PIL):
        return _open_picture(path, what)
    raise ValueError(f"The {what} has an unknown suffix: choose a file ending in {', '.join(_READABLE)}.")


def from_nibabel(image: Any, what: str, file: str) -> Scan:
    """Take values and affine, in millimeters, from a nibabel image."""
    header, affine = image.header, image.affine
    affine = np.array(header.get_best_affine() if affine is None else affine, dtype=np.float64)
    unplaced = False
    if isinstance(image, nib.Nifti1Pair):
        rank = min(len(image.shape), 3)
        steps, spacing = np.linalg.norm(header.get_sform()[:3, :rank], axis=0), header["pixdim"][1 : 1 + rank]
        if header["sform_code"] > 0 and not np.allclose(steps, spacing, rtol=1e-3):
            raise ValueError(
                f"The {what} contradicts itself, with voxels of {spacing.tolist()} mm in pixdim and of "
                f"{steps.tolist()} mm in its sform: mend its header, or export it again."
            )
        affine[:3] *= _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
        unplaced = header["sform_code"] == header["qform_code"] == 0
    with _reading(what, "an image"):
        values = np.asanyarray(image.dataobj)  # scaled; for an image in memory its own array
    return Scan(values, affine, what, file, bool(unplaced))


def storable(values: np.ndarray, path: Path) -> np.ndarray:
    """Return values in a type that a file of this suffix can hold, after a check that the format can be written.

    ITK for Python has no images of integers of 64 bits, or of 8 with a sign.
    """
    if suffix_of(path, _NIFTI):
        return values
    _import_itk(f"'{path}'")
    if values.dtype not in (np.int8, np.int64, np.uint64):
        return values
    low, high = int(values.min()), int(values.max())
    for kind in (np.int16, np.int32, np.uint32) if values.dtype == np.int8 else (np.int32, np.uint32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    if max(high, -low) > 2**53:
        raise ValueError(f"'{path}' cannot hold integers such as {max(high, -low)}: write a .nii.gz file instead.")
    return values.astype(np.float64)


def save(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write storable values `(*shape)` and their affine `(4, 4)` to a file that appears whole or not at all."""
    with written_whole(path, "image", _reason) as temporary:
        (_save_nifti if suffix_of(path, _NIFTI) else _save_itk)(values, affine, temporary)


def suffix_of(path: Path, suffixes: Sequence[str]) -> str | None:
    """Return which of these a file name ends in; a name that is nothing else does not count."""
    name = path.name.lower()
    return next((suffix for suffix in suffixes if name.endswith(suffix) and name != suffix), None)


def _open_nibabel(path: Path, what: str) -> Scan:
    """Read a NIfTI or MGH file, unless bytes are missing."""
    with _reading(what, "compressed" if path.name.lower().endswith("z") else "readable"):
        size = _content_size(path)
    kind: Any = _nifti_kind(path, what) if suffix_of(path, _NIFTI) else nib.MGHImage
    with _reading(what, "MGH" if kind is nib.MGHImage else "NIfTI"):
        image = kind.from_filename(path, mmap=False)
        needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if size < needed:
        raise ValueError(f"The {what} is cut short, {size} bytes of {needed}: copy or export it again.")
    return from_nibabel(image, what, str(path))


def _nifti_kind(path: Path, what: str) -> Any:
    """Return the class for a NIfTI file whose raw header is sound: nibabel repairs a bad spacing without a word."""
    with _reading(what, "NIfTI"):
        kind: Any = next((k for k in (nib.Nifti1Image, nib.Nifti2Image) if k.path_maybe_image(path)[0]), None)
    if kind is None:
        raise ValueError(f"The {what} is no NIfTI file, whatever its suffix says: export it again as NIfTI.")
    with _reading(what, "NIfTI"), nib.openers.ImageOpener(str(path)) as stream:
        header = kind.header_class.from_fileobj(stream, check=False)
        rank, shape = int(header["dim"][0]), header.get_data_shape()
    if min(shape, default=1) < 1:
        raise ValueError(f"The {what} has an empty axis, its shape is {shape}: export it again.")
    spacing = header["pixdim"][1 : 1 + min(rank, 3)]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(
            f"The {what} states a voxel spacing of {spacing.tolist()}: mend pixdim in its header, or export it again."
        )
    return kind


def _content_size(path: Path) -> int:
    """Return the bytes in a file once decompressed; reading to the end makes gzip compare its checksum."""
    if not path.name.lower().endswith("z"):
        return path.stat().st_size
    with gzip.open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(_BLOCK), b""))


def _open_itk(path: Path, what: str) -> Scan:
    """Read a file through ITK, after its checksums and its kind: ITK returns noise for a damaged MetaImage."""
    itk = _import_itk(what)
    with _reading(what, "an image"):
        if suffix_of(path, (*_META, *_NRRD)):
            _verify_text_header(path)
        header = _itk_header(itk, path)
    return _from_itk(itk, str(path), header, what, str(path))


def _is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, which often has no suffix, or a number for one."""
    with _reading(str(path), "a file"), path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _open_dicom(folder: Path, what: str) -> Scan:
    """Read the one DICOM series of a folder whose slices form an even, upright stack."""
    itk = _import_itk(what)
    files = _series_files(itk, folder, what)
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


def _series_files(itk: Any, folder: Path, what: str) -> list[str]:
    """Return the slices of the one DICOM series of a folder, in order."""
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
    return files


def _from_itk(itk: Any, names: str | Sequence[str], header: Any, what: str, file: str) -> Scan:
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
    return Scan(np.array(values), to_affine_nd(3, meta[MetaKeys.AFFINE]), what, file)


def _itk_header(itk: Any, path: Path) -> Any:
    """Return the ITK reader of a file, with its header read."""
    header = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise ValueError("no format that ITK knows")
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


def _verify_text_header(path: Path) -> None:
    """Check what ITK passes over in a MetaImage or NRRD file, above all the checksum of compressed values."""
    meta = suffix_of(path, _META) is not None
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        while line := stream.readline(_BLOCK).strip():
            key, _, value = line.decode("latin-1").partition("=" if meta else ":")
            fields[key.strip().lower().replace(" ", "")] = value.strip()
            if meta and "elementdatafile" in fields:
                break
        start = stream.tell()
    if meta:
        if any("nan" in fields.get(key, "").lower() for key in ("offset", "position", "origin")):
            raise ValueError("its position is not a number")  # ITK takes it for 0
        compressed = fields.get("compresseddata", "")[:1] in ("T", "t", "1")
    else:
        compressed = fields.get("encoding", "").lower() in ("gzip", "gz")
    name = fields.get("elementdatafile" if meta else "datafile", "LOCAL")
    if compressed and name.upper() == "LOCAL":
        _decompress(path, start)
    elif compressed:
        _decompress(path.parent / name, 0)


def _decompress(path: Path, start: int) -> None:
    """Decompress a file from some byte on, only to have zlib compare the checksum."""
    decoder = zlib.decompressobj(wbits=47)  # zlib's format or gzip's
    with path.open("rb") as stream:
        stream.seek(start)
        while not decoder.eof:
            if not (block := stream.read(_BLOCK)):
                raise EOFError("the compressed values end too early")
            decoder.decompress(block)


def _open_picture(path: Path, what: str) -> Scan:
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
    return Scan(values, np.eye(4), what, str(path))


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

    grid = to_affine_nd(values.ndim, affine)
    image = ITKWriter.create_backend_obj(values, channel_dim=None, affine=grid, dtype=values.dtype)
    itk.imwrite(image, str(path), compression=True)


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
