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

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.utils import convert_to_tensor

from ._landmark_formats import FRAMES, coordinates, file_text, read_rows, styles_of, write_text
from .spaces import world_matrix

__all__ = ["Landmarks", "check_inside", "outside_image", "read_landmarks", "write_landmarks"]

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
    rows = read_rows(path, frame)
    for row in rows:
        if frame not in (None, row.frame):
            raise ValueError(f"{row.where}: the file says that points are '{row.frame}', got frame='{frame}'.")
    points = _of_dims(coordinates(rows), dims, path)
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
    styles = styles_of(path)
    style = styles[0] if style is None and len(styles) == 1 else style
    if style not in styles:
        raise ValueError(f"'{path}' may be written in the style {' or '.join(map(repr, styles))}, got {style!r}.")
    frame = frame or FRAMES[style][0]
    if frame not in FRAMES[style]:
        raise ValueError(f"'{path}' may hold points as {' or '.join(map(repr, FRAMES[style]))}, got frame={frame!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"write_landmarks expects a folder that exists, got '{path}'.")
    points = _in_frame(landmarks.points_mm, frame, affine, path)
    write_text(file_text(points, landmarks.names, style, frame, path), path)
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


def _brief(point: torch.Tensor) -> str:
    """Write a point for people."""
    return f"({', '.join(f'{value:.2f}' for value in point.tolist())})"
