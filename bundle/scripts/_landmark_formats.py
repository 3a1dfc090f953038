"""Landmark files of each format as rows of text, and points as the text of such files.

Coordinates stay as they stand in the file, with the name of their frame: "ras" or "lps" millimeters, "voxel" indices
from 0, or "voxel from 1". What they mean in the world is the concern of `landmarks.py`, which describes the formats.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .atomic import written_whole

__all__ = ["FRAMES", "Row", "coordinates", "file_text", "read_rows", "styles_of", "write_text"]

_STYLES = {
    ".csv": ("csv",),
    ".fcsv": ("fcsv",),
    ".mrk.json": ("markups",),
    ".pts": ("elastix",),
    ".txt": ("elastix", "dirlab"),
}
# What the coordinates of each style may be; the first is what is written unless another is asked for.
FRAMES = {
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


class Row(NamedTuple):
    """A point as it stands in a file."""

    where: str  # file and line, for messages
    cells: Sequence[Any]  # its coordinates
    name: str  # "" if it has none
    frame: str


def styles_of(path: Path) -> tuple[str, ...]:
    """Return the styles a file of that name may have."""
    name = path.name.lower()
    styles = next((styles for suffix, styles in _STYLES.items() if name.endswith(suffix) and name != suffix), None)
    if styles is None:
        raise ValueError(f"'{path}': expected a landmark file ending in {', '.join(_STYLES)}.")
    return styles


def read_rows(path: Path, frame: str | None) -> list[Row]:
    """Read a file of any style; a CSV file is taken to be in that frame, RAS+ if there is none."""
    styles = styles_of(path)
    text = _file_content(path)
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


def coordinates(rows: Sequence[Row]) -> torch.Tensor:
    """Return the coordinates of all points as `(N, D)`, float64, as they stand in the file."""
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


def file_text(points: torch.Tensor, names: Sequence[str], style: str, frame: str, path: Path) -> str:
    """Return the content of a file of that style for points `(N, D)` in that frame."""
    if style == "csv":
        return _csv_text(points, names)
    if style == "fcsv":
        return _fcsv_text(points, names)
    if style == "markups":
        return _markups_text(points, names)
    return _elastix_text(points, frame, path) if style == "elastix" else _dirlab_text(points, path)


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all."""
    with written_whole(path, "landmarks") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _file_content(path: Path) -> str:
    """Read a file that should be text and not empty."""
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
    return text


def _csv_rows(text: str, path: Path, frame: str) -> list[Row]:
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
        return [Row(where, cells, "", frame) for where, cells in table]
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
        rows.append(Row(where, numbers, "" if label is None else cells[label], frame))
    return rows


def _fcsv_rows(text: str, path: Path) -> list[Row]:
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
                rows.append(Row(where, [named[axis] for axis in "xyz"], named.get("label", ""), frame or "ras"))
    return rows


def _markups_rows(text: str, path: Path) -> list[Row]:
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


def _markups_row(point: dict[str, Any], where: str, frame: str) -> Row | None:
    """Read one control point, or none where it has no position."""
    status = point.get("positionStatus")
    if status in _UNDEFINED or (status is None and "position" not in point):
        return None
    position = point.get("position")
    if not isinstance(position, list) or len(position) != 3:
        raise ValueError(f"{where}: expected a position of 3 numbers, got {position!r}.")
    return Row(where, position, " ".join(str(point.get("label", "")).split()), frame)


def _point_rows(text: str, path: Path, styles: Sequence[str]) -> list[Row]:
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
    rows = [Row(where, line.split(), "", "voxel from 1") for where, line in lines]
    for row in rows:
        if len(row.cells) != 3:
            raise ValueError(f"{row.where}: expected 3 voxel indices, as DIR-Lab writes, got {len(row.cells)} cells.")
    return rows


def _elastix_rows(lines: list[tuple[str, str]], path: Path) -> list[Row]:
    """Read an input file of transformix."""
    frame = "lps" if lines[0][1].lower() == "point" else "voxel"
    if len(lines) < 2 or not re.fullmatch("[0-9]+", lines[1][1]):
        where, got = lines[1] if len(lines) > 1 else (f"'{path}'", "")
        raise ValueError(f"{where}: expected the number of points below '{lines[0][1]}', got '{got}'.")
    where, count = lines[1]
    rows = [Row(where, line.split(), "", frame) for where, line in lines[2:]]
    if len(rows) != int(count):
        raise ValueError(f"{where}: expected as many points as the file says, {count}, got {len(rows)}.")
    return rows


def _transformix_rows(lines: list[tuple[str, str]]) -> list[Row]:
    """Read where transformix says that points went."""
    rows = []
    for where, line in lines:
        found = _OUTPUT_POINT.search(line)
        if not found:
            raise ValueError(f"{where}: expected 'OutputPoint = [ ... ]', got '{line[:80]}'.")
        rows.append(Row(where, found.group(1).split(), "", "lps"))
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
