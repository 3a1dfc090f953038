"""Write what a registration gave into a folder: images, transforms, landmarks, a picture and a report."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import optional_import

from .atomic import written_whole
from .evaluation import jsonable
from .images import writable_folder, write_image
from .io import write_displacement_field
from .landmarks import write_landmarks
from .learn2reg import write_learn2reg
from .lists import file_stem
from .pictures import quality_figure, save_figure
from .registration import Registration
from .transform_files import write_affine, write_transform
from .world import affine_inverse, index_displacement, split_affine

__all__ = ["EXPORTS", "REPORT", "check_results", "save_registration", "spare_inputs", "write_text"]

EXPORTS = ("h5", "affine", "learn2reg")
REPORT = "report.json"
_STAGING = ".registering_"


def save_registration(
    registration: Registration, folder: str | Path, exports: Iterable[str] = (), picture: bool = True
) -> dict[str, Path]:
    """Write a registration's results.

    `moved.nii.gz` and `fixed_to_moving.nii.gz` lie on the fixed image's grid, `moving_to_fixed.nii.gz` on the moving
    image's; the two transforms are ITK displacement fields, LPS+ millimeters, which ITK, SimpleITK, ANTs and 3D Slicer
    read. With labels and landmarks there are `moved_label.nii.gz`, `moved_points.csv` (in the fixed image) and
    `fixed_points_in_moving.csv`, RAS+ millimeters; and there is a picture, `qc.png`, where matplotlib is installed.
    `report.json` comes last: where it is, all is there. Files are written beside their final place and then moved
    there, so that a failure leaves what was there before.

    Args:
        registration: what `equireg.register` returned.
        folder: where the files go; it is made if it does not exist.
        exports: any of "h5" (both transforms as ITK composites of an affine and the rest), "affine" (the best-fitting
            affine as an ITK transform, `affine.tfm`) and "learn2reg" (`disp_<fixed>_<moving>.nii.gz`, voxels).
        picture: draw `qc.png`.

    Returns:
        What each file is to its path.

    Raises:
        ValueError: for an unknown export, a folder that cannot be written to, or one in which a result would take the
            place of an input.
        OSError: if a file cannot be written.
    """
    exports = tuple(exports)
    check_results(folder, exports)
    folder = writable_folder(folder)
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)  # by a run that was killed
    report = {**registration.report, "exports": sorted(exports), "picture": picture}
    writers = {**_writers(registration), **_exporters(registration, exports)}
    if picture and optional_import("matplotlib")[1]:
        writers["picture"] = ("qc.png", partial(_draw, registration))
    elif picture:
        report["warnings"] = [*report["warnings"], "no picture: matplotlib is not installed."]
    targets = {what: folder / name for what, (name, _) in writers.items()} | {"report": folder / REPORT}
    spare_inputs(targets.values(), report["inputs"].values())
    stale = _written_before(folder) - set(targets.values())
    report["files"] = {what: path.name for what, path in targets.items()}
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        for name, write in writers.values():
            write(staging / name)
        (staging / REPORT).write_text(json.dumps(jsonable(report), indent=2, allow_nan=False) + "\n")
        (folder / REPORT).unlink(missing_ok=True)  # until all is there again, nothing says that it is
        for path in stale:
            path.unlink(missing_ok=True)  # results of another registration do not stay beside these
        for path in targets.values():
            os.replace(staging / path.name, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return targets


_Writers = dict[str, tuple[str, Callable[[Path], Any]]]


def _writers(result: Registration) -> _Writers:
    """Return what is always written: what it is, its file name, and what writes it to a path."""
    writers: _Writers = {"moved": ("moved.nii.gz", partial(write_image, result.moved))}
    for name in ("fixed_to_moving", "moving_to_fixed"):
        field = getattr(result, name)
        writers[name] = (f"{name}.nii.gz", partial(write_displacement_field, field, field.affine))
    if result.moved_label is not None:
        writers["moved_label"] = ("moved_label.nii.gz", partial(write_image, result.moved_label))
    for name in ("moved_points", "fixed_points_in_moving"):
        points = getattr(result, name)
        if points is not None:
            writers[name] = (f"{name}.csv", partial(write_landmarks, points))
    return writers


def _exporters(result: Registration, exports: Iterable[str]) -> _Writers:
    """Return what is written when asked for, as `_writers`."""
    affine = torch.tensor(result.report["best_affine"], dtype=torch.float64)
    names = "_".join(_stem(result.pair[role], role) for role in ("fixed", "moving"))
    writers: dict[str, _Writers] = {
        "h5": {
            "fixed_to_moving_h5": ("fixed_to_moving.h5", partial(_write_composite, result.fixed_to_moving, affine)),
            "moving_to_fixed_h5": (
                "moving_to_fixed.h5",
                partial(_write_composite, result.moving_to_fixed, affine_inverse(affine)),
            ),
        },
        "affine": {"affine": ("affine.tfm", partial(write_affine, affine))},
        "learn2reg": {"learn2reg": (f"disp_{names}.nii.gz", partial(_write_learn2reg, result))},
    }
    return {what: entry for export in exports for what, entry in writers[export].items()}


def _write_composite(field: MetaTensor, affine: torch.Tensor, path: Path) -> None:
    write_transform(split_affine(field, affine), path)


def _write_learn2reg(result: Registration, path: Path) -> None:
    write_learn2reg(index_displacement(result.fixed_to_moving, result.pair["moving"]), path)


def _draw(result: Registration, path: Path) -> None:
    """Draw the picture by which a person judges the registration."""
    report, pair = result.report, result.pair
    similarity = report["similarity"]
    numbers = [
        f"{similarity['measure']} {similarity['before']:.3f} before, {similarity['after']:.3f} after",
        f"folding {report['folding_percent']:.3g} %",
        f"network inverse consistency {report['network_inverse_consistency_mm']:.2g} mm",
    ]
    figure = quality_figure(
        pair["moving"],
        pair["fixed"],
        result.moved,
        result.fixed_to_moving,
        moved_label=result.moved_label,
        fixed_label=pair.get("fixed_label"),
        title=" to ".join(_stem(pair[role], role) for role in ("moving", "fixed")),
        lines=["; ".join(numbers), *(f"Warning: {warning}" for warning in report["warnings"])],
        background=tuple(report["options"]["background"]),
    )
    save_figure(figure, path)


def _stem(image: MetaTensor, role: str) -> str:
    """Return the name of the file of an image, or its role where it comes from none."""
    return file_stem(image.meta.get("filename_or_obj") or role)


def check_results(folder: str | Path, exports: Iterable[str] = ()) -> None:
    """Make sure, before the work is done, that its results can be written; nothing is created.

    Args:
        folder: where they will go.
        exports: as for `save_registration`.

    Raises:
        ValueError: for an unknown export, or a folder that cannot be made or written to.
        ImportError: if an export needs a package that is not installed.
    """
    exports = tuple(exports)
    if not set(exports) <= set(EXPORTS):
        raise ValueError(f"exports are any of {', '.join(EXPORTS)}, got {', '.join(exports)}.")
    if {"h5", "affine"} & set(exports) and not optional_import("itk")[1]:
        raise ImportError("the exports h5 and affine need ITK for Python: pip install itk, or 'equireg[itk]'.")
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    writable_folder(there)  # of those that exist, the one in which the folder will lie


def spare_inputs(targets: Iterable[str | Path], inputs: Iterable[str | Path | None]) -> None:
    """Refuse to put a result where an input lies.

    Args:
        targets: files that are to be written.
        inputs: files that were read; None and what is no file is left out.

    Raises:
        ValueError: naming the first target that is an input.
    """
    there = [Path(path) for path in inputs if path and Path(path).exists()]
    for target in map(Path, targets):
        if target.exists() and any(target.samefile(path) for path in there):
            raise ValueError(f"the result '{target}' would take the place of an input: choose another name or folder.")


def _written_before(folder: Path) -> set[Path]:
    """Return the results that an earlier registration left in a folder, by its report."""
    try:
        names = json.loads((folder / REPORT).read_text())["files"].values()
        return {folder / Path(name).name for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def write_text(text: str, path: Path) -> Path:
    """Write a text file that appears only when complete.

    Args:
        text: what it holds.
        path: the file, in a folder that exists.

    Returns:
        The path.

    Raises:
        OSError: if it cannot be written.
    """
    with written_whole(path, "table" if path.suffix == ".csv" else "report") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
