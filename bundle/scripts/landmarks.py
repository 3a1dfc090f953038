"""Landmarks as files: CSV tables, 3D Slicer's markups, the point files of elastix and of DIR-Lab.

In memory landmarks are RAS+ millimeters. In files they are, by the end of the file's name,

- `.csv`: RAS+ millimeters unless `frame` says otherwise, in columns x, y (and z), maybe name or label; or no header and
  2 or 3 numbers a line. The tables of `antsApplyTransformsToPoints` are LPS+ millimeters: `frame="lps"`.
- `.fcsv` and `.mrk.json` of 3D Slicer: LPS+ or RAS+ millimeters, as the file says.
- `.txt` and `.pts` of elastix and transformix: LPS+ millimeters below the word `point`, voxel indices below `index`; of
  transformix' `outputpoints.txt`, `OutputPoint` is read.
- `.txt` of DIR-Lab: three voxel indices a line, counted from 1.

Other voxel indices count from 0, along the array axes of the image whose affine is given, centers at integers.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.utils import convert_to_tensor

from .spaces import world_matrix

__all__ = ["Landmarks", "check_inside", "outside_image", "read_landmarks", "write_landmarks"]

_STYLES = {
    ".csv": ("csv",),
    ".fcsv": ("fcsv",),
    ".mrk.json": ("markups",),
    ".pts": ("elastix",),
    ".txt": ("elastix", "dirlab"),
}
# What the coordinates of each style may be; the first is what is written unless another is asked for.
_FRAMES = {
    "csv": ("ras", "lps", "voxel"),
    "fcsv": ("lps",),
    "markups": ("lps",),
    "elastix": ("lps", "voxel"),
    "dirlab": ("voxel from 1",),
}
_SYSTEMS = {"RAS": "ras", "0": "ras", "LPS": "lps", "1": "lps"}  # Slicer before 4.11 wrote numbers

_OLD_FCSV_COLUMNS = ["label", "x", "y", "z", "sel", "vis"]  # Slicer 3
_FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatednodeid".split(",")
_FCSV_HEADER = """\
# Markups fiducial file version = 4.13
# CoordinateSystem = LPS
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
"""
# The oldest version of the schema: Slicer 4.11 reads no other, later ones read every 1.x.y.
_MARKUPS_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.0.json#"
)
_UNDEFINED = ("undefined", "missing")

_LOGGED_POINT = re.compile(r"Point\s+\d+\s*;")
_OUTPUT_POINT = re.compile(r"\bOutputPoint\s*=\s*\[([^\]]*)\]")

_ROUNDING = 1e-6  # voxels by which a point on the border may miss it because of rounding


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Named points in the world.

    Args:
        points_mm: `(N, D)`, N at least 1 and D = 2 or 3, RAS+ millimeters, finite; kept as float64 on the CPU.
        names: one line of text for each point; "1" to "N" if left out.

    Raises:
        ValueError: for points or names that are not like that.

    Example:
        >>> Landmarks(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).names
        ('1', '2')
    """

    points_mm: torch.Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        points = convert_to_tensor(self.points_mm, track_meta=False, dtype=torch.float64, device="cpu").detach()
        if points.dim() != 2 or points.shape[0] < 1 or points.shape[1] not in (2, 3):
            raise ValueError(f"Landmarks expects points of shape (N, 2) or (N, 3), got {list(points.shape)}.")
        if not bool(torch.isfinite(points).all()):
            raise ValueError("Landmarks expects finite points, got NaN or infinity.")
        names = tuple(self.names) or tuple(str(number) for number in range(1, len(points) + 1))
        if len(names) != len(points):
            raise ValueError(f"Landmarks expects a name for each of {len(points)} points, got {len(names)} names.")
        if not all(isinstance(name, str) and len(name.splitlines()) <= 1 for name in names):
            raise ValueError(f"Landmarks expects names of one line each, got {names}.")
        object.__setattr__(self, "points_mm", points)
        object.__setattr__(self, "names", names)


class _Row(NamedTuple):
    """A point as it stands in a file."""

    where: str  # file and line, for messages
    cells: Sequence[Any]  # its coordinates
    name: str  # "" if it has none
    frame: str


def read_landmarks(
    path: str | os.PathLike[str],
    affine: torch.Tensor | np.ndarray | None = None,
    frame: str | None = None,
    dims: int | None = None,
) -> Landmarks:
    r"""Read landmarks from any of the formats above.

    `.txt` files are told apart by their first line. Points that Slicer marks as undefined or missing are left out;
    points without a name are numbered from 1.

    Args:
        path: the file.
        affine: voxel indices of the image the points lie in to RAS+ millimeters, `(4, 4)` or `(D + 1, D + 1)`; needed
            where the file counts voxels.
        frame: what the numbers in a CSV file are: "ras" (if left out) or "lps" millimeters, or "voxel", indices from 0.
            Other formats say it themselves and refuse another frame.
        dims: D, if it should be checked. Where it is 2, three coordinates are taken, too, if the third is always 0, as
            Slicer and ANTs write points of 2D images.

    Returns:
        The landmarks, RAS+ millimeters.

    Raises:
        ValueError: naming the file and, where one is at fault, its line: if it is missing, empty, not text or of no
            format above; has no point, rows of different lengths, coordinates that are no finite numbers, an unknown
            coordinate system or unit, or another number of points than it says; if `affine` or `frame` is missing or
            does not fit, or the points are not `dims`-dimensional.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "points.csv")
        ...     _ = path.write_text("x,y,z,label\n-1,-2,3,carina\n")
        ...     landmarks = read_landmarks(path, frame="lps")
        >>> landmarks.names, landmarks.points_mm.tolist()
        (('carina',), [[1.0, 2.0, 3.0]])
    """
    path = Path(path)
    if frame not in (None, "ras", "lps", "voxel"):
        raise ValueError(f"read_landmarks of '{path}' expects the frame 'ras', 'lps' or 'voxel', got {frame!r}.")
    rows = _rows(path, frame)
    for row in rows:
        if frame not in (None, row.frame):
            raise ValueError(f"{row.where}: the file says that points are '{row.frame}', got frame='{frame}'.")
    points = _of_dims(_numbers(rows), dims, path)
    is_lps = torch.tensor([row.frame == "lps" for row in rows])[:, None]  # each markup of Slicer has its own system
    points = torch.where(is_lps, _flipped(points), points)
    if rows[0].frame.startswith("voxel"):
        matrix = _matrix(affine, points.shape[1], path)
        first = 1 if rows[0].frame == "voxel from 1" else 0
        points = (points - first) @ matrix[:-1, :-1].T + matrix[:-1, -1]
    return Landmarks(points, tuple(row.name or str(number) for number, row in enumerate(rows, start=1)))


def write_landmarks(
    landmarks: Landmarks,
    path: str | os.PathLike[str],
    affine: torch.Tensor | np.ndarray | None = None,
    style: str | None = None,
    frame: str | None = None,
) -> Path:
    """Write landmarks in the format that the end of the file's name stands for.

    Millimeters are written to the last bit, DIR-Lab's indices with 4 decimals where they are not whole. Elastix and
    DIR-Lab files hold no names. The file appears whole or not at all, and one that was there stays if writing fails.

    Args:
        landmarks: the points, RAS+ millimeters; 2D ones get a third coordinate of 0 for Slicer.
        path: file to write, ending in `.csv`, `.fcsv`, `.mrk.json`, `.pts` or `.txt`, in a folder that exists.
        affine: as for `read_landmarks`; needed where voxels are counted.
        style: "elastix" or "dirlab", which a `.txt` file needs.
        frame: "lps" (what ANTs wants) or "voxel" instead of "ras" for a CSV file, "voxel" instead of "lps" for one of
            elastix; other formats have one frame only.

    Returns:
        The path written.

    Raises:
        ValueError: if the file's name, its folder, `style`, `frame` or `affine` is not like that; for 2D points in
            DIR-Lab style, or elastix indices that are not whole: transformix would round them.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_landmarks(Landmarks(torch.tensor([[1.0, 2.0, 3.0]])), Path(folder, "points.pts"))
        ...     path.read_text().split()
        ['point', '1', '-1.0', '-2.0', '3.0']
    """
    path = Path(path)
    styles = _styles(path)
    style = styles[0] if style is None and len(styles) == 1 else style
    if style not in styles:
        raise ValueError(f"'{path}' may be written in the style {' or '.join(map(repr, styles))}, got {style!r}.")
    frame = frame or _FRAMES[style][0]
    if frame not in _FRAMES[style]:
        raise ValueError(f"'{path}' may hold points as {' or '.join(map(repr, _FRAMES[style]))}, got frame={frame!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"write_landmarks expects a folder that exists, got '{path}'.")
    points = _in_frame(landmarks.points_mm, frame, affine, path)
    if style == "csv":
        text = _csv_text(points, landmarks.names)
    elif style == "fcsv":
        text = _fcsv_text(points, landmarks.names)
    elif style == "markups":
        text = _markups_text(points, landmarks.names)
    elif style == "elastix":
        text = _elastix_text(points, frame, path)
    else:
        text = _dirlab_text(points, path)
    _write(text, path)
    return path


def outside_image(points_mm: torch.Tensor, affine: torch.Tensor | np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """Tell which points lie outside an image, that is, outside the cells of all its voxels.

    Args:
        points_mm: `(N, D)`, RAS+ millimeters.
        affine: voxel indices of the image to RAS+ millimeters, `(4, 4)` or `(D + 1, D + 1)`.
        shape: voxels along each of the D axes.

    Returns:
        `(N,)`, bool; True where an index is more than half a voxel below 0 or above the last, or a coordinate is NaN.

    Raises:
        ValueError: if the number of coordinates and axes differ, or for an affine that `world_matrix` refuses.

    Example:
        >>> outside_image(torch.tensor([[-0.5, 0.0], [0.0, 4.6]]), torch.eye(3), (4, 5)).tolist()
        [False, True]
    """
    if points_mm.dim() != 2 or points_mm.shape[1] != len(shape):
        raise ValueError(
            f"outside_image expects points (N, {len(shape)}) for the shape {list(shape)}, got {list(points_mm.shape)}."
        )
    index = _to_index(points_mm, world_matrix(affine, len(shape)))
    last = torch.tensor(list(shape)) - 1
    slack = 0.5 + _ROUNDING
    return ~((index >= -slack) & (index <= last + slack)).all(dim=1)


def check_inside(
    landmarks: Landmarks,
    affine: torch.Tensor | np.ndarray,
    shape: Sequence[int],
    path: str | os.PathLike[str],
) -> None:
    """Refuse landmarks that do not all lie in their image, and say what may be wrong with their frame.

    Args:
        landmarks: the points.
        affine: voxel indices of the image to RAS+ millimeters.
        shape: voxels along each of its axes.
        path: the file the landmarks come from, for the message.

    Raises:
        ValueError: if a point lies outside, see `outside_image`, or the points have not as many coordinates as the
            image axes.

    Example:
        >>> check_inside(Landmarks(torch.zeros(1, 3)), torch.eye(4), (4, 5, 6), "points.csv")
    """
    points, dims = landmarks.points_mm, len(shape)
    if points.shape[1] != dims:
        raise ValueError(f"'{path}': expected {dims}D points, as the image is, got {points.shape[1]}D ones.")
    outside = outside_image(points, affine, shape)
    if not bool(outside.any()):
        return
    first = int(outside.nonzero()[0])
    index = _to_index(points[first : first + 1], world_matrix(affine, dims))[0]
    hint = ""
    if not bool(outside_image(_flipped(points), affine, shape).any()):
        hint = " With x and y flipped all would lie inside: the file seems to be in the other of RAS and LPS."
    elif not bool(outside_image(points, torch.eye(dims + 1), shape).any()):
        hint = " As voxel indices all would lie inside: the file may need frame='voxel'."
    raise ValueError(
        f"'{path}': {int(outside.sum())} of {len(points)} points lie outside the image of shape {list(shape)}, the "
        f"first of them, '{landmarks.names[first]}', at {_brief(points[first])} mm RAS+, voxel {_brief(index)}.{hint}"
    )


def _styles(path: Path) -> tuple[str, ...]:
    """Return the styles a file of that name may have."""
    name = path.name.lower()
    styles = next((styles for suffix, styles in _STYLES.items() if name.endswith(suffix) and name != suffix), None)
    if styles is None:
        raise ValueError(f"'{path}': expected a landmark file ending in {', '.join(_STYLES)}.")
    return styles


def _rows(path: Path, frame: str | None) -> list[_Row]:
    """Read a file of any style."""
    styles = _styles(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"Cannot read landmarks from '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}': expected landmarks as text in UTF-8, got other bytes: {error.reason}.") from error
    if "\0" in text:
        raise ValueError(f"'{path}': expected landmarks as text in UTF-8, got binary data.")
    if not text.strip():
        raise ValueError(f"'{path}': expected landmarks, got an empty file.")
    try:
        if styles == ("csv",):
            rows = _csv_rows(text, path, frame or "ras")
        elif styles == ("fcsv",):
            rows = _fcsv_rows(text, path)
        elif styles == ("markups",):
            rows = _markups_rows(text, path)
        else:
            rows = _point_rows(text, path, styles)
    except csv.Error as error:
        raise ValueError(f"'{path}': expected comma-separated values, got an error: {error}.") from error
    if not rows:
        raise ValueError(f"'{path}': expected at least one point, got none.")
    return rows


def _csv_rows(text: str, path: Path, frame: str) -> list[_Row]:
    """Read a comma-separated table, with a header or without."""
    table: list[tuple[str, list[str]]] = []
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    for row in reader:
        if any(cell.strip() for cell in row):  # spreadsheets leave rows of nothing but commas
            table.append((f"'{path}', line {reader.line_num}", [" ".join(cell.split()) for cell in row]))
    if not table:
        return []
    where, header = table[0]
    if all(_number(cell) is not None for cell in header):
        return [_Row(where, cells, "", frame) for where, cells in table]
    columns = [cell.lower() for cell in header]
    axes = [axis for axis in "xyz" if axis in columns]
    if axes[:2] != ["x", "y"] or any(columns.count(axis) > 1 for axis in axes):
        raise ValueError(
            f"{where}: expected a header with one column x, one y and, in 3D, one z, separated by commas, or 2 or 3 "
            f"numbers, got {header}."
        )
    label = next((columns.index(name) for name in ("name", "label") if name in columns), None)
    rows = []
    for where, cells in table[1:]:
        if len(cells) != len(columns):
            raise ValueError(f"{where}: expected {len(columns)} cells, as in the header, got {len(cells)}.")
        numbers = [cells[columns.index(axis)] for axis in axes]
        rows.append(_Row(where, numbers, "" if label is None else cells[label], frame))
    return rows


def _fcsv_rows(text: str, path: Path) -> list[_Row]:
    """Read Slicer's fiducial list of any version."""
    frame: str | None = None
    columns, rows, is_old = _OLD_FCSV_COLUMNS, [], True
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"'{path}', line {number}"
        if line.startswith("#"):
            key, _, value = (part.strip() for part in line[1:].partition("="))
            if key.lower() == "markups fiducial file version":
                columns, is_old = _FCSV_COLUMNS, False
            elif key.lower() == "coordinatesystem":
                frame = _system(value, where)
            elif key.lower() == "columns":
                columns = [name.strip().lower() for name in value.split(",")]
        elif line.strip():
            cells = [cell.strip() for cell in next(csv.reader([line]))]
            missing = [axis for axis in "xyz" if axis not in columns[: len(cells)]]
            if missing:
                raise ValueError(f"{where}: expected the columns {','.join(columns)}, got no {missing[0]} in {cells}.")
            named = dict(zip(columns, cells))
            if frame is None and not is_old:  # which Slicer took for RAS at first, and later for LPS
                raise ValueError(f"{where}: expected '# CoordinateSystem = LPS' or RAS above the points, got none.")
            # Slicer 5 adds two columns it does not name; the first says 0 of undefined and 3 of missing points.
            if columns != _FCSV_COLUMNS or cells[len(columns) :][:1] not in (["0"], ["3"]):
                rows.append(_Row(where, [named[axis] for axis in "xyz"], named.get("label", ""), frame or "ras"))
    return rows


def _markups_rows(text: str, path: Path) -> list[_Row]:
    """Read the control points of all markups in a file of Slicer."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{path}': expected JSON, got an error: {error}.") from error
    markups = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(markups, list) or not all(isinstance(markup, dict) for markup in markups):
        raise ValueError(f"'{path}': expected a list of Slicer markups as 'markups'.")
    rows = []
    for number, markup in enumerate(markups, start=1):
        where = f"'{path}', markup {number}"
        frame = _system(markup.get("coordinateSystem", "LPS"), where)
        unit = markup.get("coordinateUnits", "mm")
        if (unit[:1] if isinstance(unit, list) else [unit]) != ["mm"]:  # either the code, or [code, scheme, meaning]
            raise ValueError(f"{where}: expected coordinateUnits of mm, got {unit!r}.")
        points = markup.get("controlPoints", [])
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise ValueError(f"{where}: expected a list of points as 'controlPoints'.")
        rows += [row for row in (_markups_row(p, f"{where}, point {i}", frame) for i, p in enumerate(points, 1)) if row]
    return rows


def _markups_row(point: dict[str, Any], where: str, frame: str) -> _Row | None:
    """Read one control point, or none where it has no position."""
    status = point.get("positionStatus")
    if status in _UNDEFINED or (status is None and "position" not in point):
        return None
    position = point.get("position")
    if not isinstance(position, list) or len(position) != 3:
        raise ValueError(f"{where}: expected a position of 3 numbers, got {position!r}.")
    return _Row(where, position, " ".join(str(point.get("label", "")).split()), frame)


def _point_rows(text: str, path: Path, styles: Sequence[str]) -> list[_Row]:
    """Read what elastix or transformix wrote or DIR-Lab hands out, whichever the first line speaks for."""
    lines = [(f"'{path}', line {i}", line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    where, first = lines[0]
    if first.lower() in ("point", "index"):
        return _elastix_rows(lines, path)
    if _LOGGED_POINT.match(first):
        return _transformix_rows(lines)
    if "dirlab" not in styles or _number(first.split()[0]) is None:
        indices = ", or three voxel indices" if "dirlab" in styles else ""
        raise ValueError(f"{where}: expected 'point', 'index' or a line of outputpoints.txt{indices}, got '{first}'.")
    rows = [_Row(where, line.split(), "", "voxel from 1") for where, line in lines]
    for row in rows:
        if len(row.cells) != 3:
            raise ValueError(f"{row.where}: expected 3 voxel indices, as DIR-Lab writes, got {len(row.cells)} cells.")
    return rows


def _elastix_rows(lines: list[tuple[str, str]], path: Path) -> list[_Row]:
    """Read an input file of transformix."""
    frame = "lps" if lines[0][1].lower() == "point" else "voxel"
    if len(lines) < 2 or not re.fullmatch("[0-9]+", lines[1][1]):
        where, got = lines[1] if len(lines) > 1 else (f"'{path}'", "")
        raise ValueError(f"{where}: expected the number of points below '{lines[0][1]}', got '{got}'.")
    where, count = lines[1]
    rows = [_Row(where, line.split(), "", frame) for where, line in lines[2:]]
    if len(rows) != int(count):
        raise ValueError(f"{where}: expected as many points as the file says, {count}, got {len(rows)}.")
    return rows


def _transformix_rows(lines: list[tuple[str, str]]) -> list[_Row]:
    """Read where transformix says that points went."""
    rows = []
    for where, line in lines:
        found = _OUTPUT_POINT.search(line)
        if not found:
            raise ValueError(f"{where}: expected 'OutputPoint = [ ... ]', got '{line[:80]}'.")
        rows.append(_Row(where, found.group(1).split(), "", "lps"))
    return rows


def _system(value: Any, where: str) -> str:
    """Return the frame that Slicer names so."""
    frame = _SYSTEMS.get(str(value).strip().upper())
    if frame is None:
        raise ValueError(f"{where}: expected the coordinate system LPS or RAS, got {value!r}.")
    return frame


def _number(cell: Any) -> float | None:
    """Return a number, or None for what is none."""
    try:
        # Python reads more as numbers than people write as such.
        return None if isinstance(cell, bool) or "_" in str(cell) else float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _numbers(rows: Sequence[_Row]) -> torch.Tensor:
    """Return the coordinates of all points as `(N, D)`, as they stand in the file."""
    expected = len(rows[0].cells)
    if expected not in (2, 3):
        raise ValueError(f"{rows[0].where}: expected 2 or 3 coordinates, got {expected}.")
    points = []
    for row in rows:
        if len(row.cells) != expected:
            raise ValueError(f"{row.where}: expected {expected} coordinates, as before, got {len(row.cells)}.")
        values = [_number(cell) for cell in row.cells]
        for cell, value in zip(row.cells, values):
            if value is None or not math.isfinite(value):
                raise ValueError(f"{row.where}: expected a finite number as coordinate, got {cell!r}.")
        points.append(values)
    return torch.tensor(points, dtype=torch.float64)


def _of_dims(points: torch.Tensor, dims: int | None, path: Path) -> torch.Tensor:
    """Check the number of coordinates; a third that is always 0 is none."""
    if dims == 2 and points.shape[1] == 3 and not bool(points[:, 2].any()):
        return points[:, :2]
    if dims not in (None, points.shape[1]):
        raise ValueError(f"'{path}': expected {dims}D points, got {points.shape[1]}D ones.")
    return points


def _flipped(points: torch.Tensor) -> torch.Tensor:
    """Turn RAS+ into LPS+ or back; no zero gets a sign."""
    return points * points.new_tensor([-1.0, -1.0, 1.0])[: points.shape[1]] + 0.0


def _matrix(affine: torch.Tensor | np.ndarray | None, dims: int, path: Path) -> torch.Tensor:
    """Check the affine by which a file counts voxels; return it as `(D + 1, D + 1)`."""
    if affine is None:
        raise ValueError(f"'{path}' counts voxels: expected the affine of their image, got none.")
    try:
        return world_matrix(affine, dims)
    except ValueError as error:
        raise ValueError(f"'{path}' holds {dims}D voxel indices: {error}") from error


def _to_index(points_mm: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return world points `(N, D)` as voxel indices, float64."""
    offset = points_mm.to("cpu", torch.float64) - matrix[:-1, -1]
    return torch.linalg.solve(matrix[:-1, :-1], offset.T).T


def _in_frame(
    points_mm: torch.Tensor, frame: str, affine: torch.Tensor | np.ndarray | None, path: Path
) -> torch.Tensor:
    """Return world points `(N, D)` as a file of that frame has them."""
    if frame == "lps":
        return _flipped(points_mm)
    if frame == "ras":
        return points_mm + 0.0
    index = _to_index(points_mm, _matrix(affine, points_mm.shape[1], path))
    return index + 1 if frame == "voxel from 1" else index


def _csv_text(points: torch.Tensor, names: Sequence[str]) -> str:
    """Write a table; names come last, as ANTs takes the first columns for coordinates."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*"xyz"[: points.shape[1]], "name"])
    writer.writerows([*map(repr, point), name] for point, name in zip(points.tolist(), names))
    return stream.getvalue()


def _fcsv_text(points: torch.Tensor, names: Sequence[str]) -> str:
    """Write a fiducial list of Slicer from LPS+ points."""
    stream = io.StringIO(_FCSV_HEADER)
    stream.seek(0, io.SEEK_END)
    writer = csv.writer(stream, lineterminator="\n")
    for number, (point, name) in enumerate(zip(_in_3d(points), names), start=1):
        writer.writerow([number, *map(repr, point), 0, 0, 0, 1, 1, 1, 0, name, "", ""])
    return stream.getvalue()


def _markups_text(points: torch.Tensor, names: Sequence[str]) -> str:
    """Write a point list of Slicer from LPS+ points; its reader wants a decimal point in every coordinate."""
    control_points = [
        {"id": str(number), "label": name, "position": point, "positionStatus": "defined"}
        for number, (point, name) in enumerate(zip(_in_3d(points), names), start=1)
    ]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": control_points}
    return json.dumps({"@schema": _MARKUPS_SCHEMA, "markups": [markup]}, indent=2, ensure_ascii=False) + "\n"


def _elastix_text(points: torch.Tensor, frame: str, path: Path) -> str:
    """Write an input file of transformix."""
    lines = [" ".join(map(repr if frame == "lps" else _index_text, point)) for point in points.tolist()]
    if frame == "voxel" and any("." in line for line in lines):
        raise ValueError(
            f"'{path}' expects whole voxel indices, which transformix would round to; write points instead."
        )
    return "\n".join(["point" if frame == "lps" else "index", str(len(lines)), *lines, ""])


def _dirlab_text(points: torch.Tensor, path: Path) -> str:
    """Write voxel indices as DIR-Lab does."""
    if points.shape[1] != 3:
        raise ValueError(f"'{path}' expects 3D points, as DIR-Lab has, got {points.shape[1]}D ones.")
    return "".join(" ".join(map(_index_text, point)) + "\n" for point in points.tolist())


def _index_text(value: float) -> str:
    """Write an index, with 4 decimals where it is not whole."""
    return f"{round(value, 4) + 0.0:.4f}".removesuffix(".0000")


def _in_3d(points: torch.Tensor) -> list[list[float]]:
    """Return points as lists of three coordinates."""
    return torch.nn.functional.pad(points, (0, 3 - points.shape[1])).tolist()


def _brief(point: torch.Tensor) -> str:
    """Write a point for people."""
    return f"({', '.join(f'{value:.2f}' for value in point.tolist())})"


def _write(text: str, path: Path) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the landmarks: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
