"""Landmark files: known files with their signs, round trips, SimpleITK as the judge of voxels, and what is refused."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from equireg.landmarks import Landmarks, check_inside, outside_image, read_landmarks, write_landmarks

sitk = pytest.importorskip("SimpleITK")


def make_affine(spacing: tuple[float, ...], origin: tuple[float, ...], seed: int | None = None) -> np.ndarray:
    """An affine `(D + 1, D + 1)` along the world axes, or oblique and maybe left-handed if there is a seed."""
    dims = len(spacing)
    direction = np.eye(dims)
    if seed is not None:
        direction, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dims, dims)))
    affine = np.eye(dims + 1)
    affine[:dims, :dims], affine[:dims, dims] = direction * np.abs(spacing) * np.sign(spacing), origin
    return affine


def four_by_four(affine: np.ndarray) -> np.ndarray:
    """The affine of a 2D grid as MONAI has it, with something senseless where 2D grids have nothing."""
    full = np.diag([1.0, 1.0, 7.0, 1.0])
    full[:2, :2], full[:2, 3], full[2, 3] = affine[:2, :2], affine[:2, 2], -3.0
    return full


AFFINES = {
    "RAS": make_affine((1, 1, 1), (0, 0, 0)),
    "LPS, anisotropic": make_affine((-0.8, -0.9, 2.5), (120, -35, -900)),
    "oblique": make_affine((0.7, 1.3, 3), (-31, 17, 90), seed=1),
    "oblique, flipped": make_affine((-2, 1, 0.5), (9, 1, -7), seed=2),
    "2D": make_affine((1, 1), (0, 0)),
    "2D oblique, flipped": make_affine((0.6, -1.7), (-12, 30), seed=3),
    "2D, 4x4": four_by_four(make_affine((0.6, 1.7), (-12, 30), seed=4)),
}
IN_3D = [name for name in AFFINES if not name.startswith("2D")]


def dims_of(name: str) -> int:
    return 2 if name.startswith("2D") else 3


def world(name: str, index: np.ndarray) -> np.ndarray:
    """Where SimpleITK puts voxel indices `(N, D)` of an image with that affine, in RAS+ millimeters."""
    affine, dims = AFFINES[name], dims_of(name)
    steps, origin = affine[:dims, :dims], affine[:dims, -1]
    flip = np.diag([-1.0, -1.0, 1.0])[:dims, :dims]
    spacing = np.linalg.norm(steps, axis=0)
    image = sitk.Image([4] * dims, sitk.sitkUInt8)
    image.SetOrigin((flip @ origin).tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flip @ (steps / spacing)).ravel().tolist())
    if np.array_equal(index, index.round()):
        points = [image.TransformIndexToPhysicalPoint(row.astype(int).tolist()) for row in index]
    else:
        points = [image.TransformContinuousIndexToPhysicalPoint(row.tolist()) for row in index]
    return np.array(points) @ flip


def some_landmarks(dims: int) -> Landmarks:
    points = 100 * torch.randn(7, dims, dtype=torch.float64)
    points[3] = 0.0
    points[4, 0] = 1e-7
    return Landmarks(points, ("carina", "left, lower", 'the "best"', "Hüfte", "5", "a b", "#7"))


def save(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# Known files


FCSV = "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n# columns = {}\n"
COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
OUTPUT = "Point\t{}\t; InputIndex = [ 1 2 3 ]\t; InputPoint = [ 9 9 9 ]\t; OutputIndexFixed = [ 4 5 6 ]\t; OutputPoint"
OUTPUT += " = [ {} ]\t; Deformation = [ 0.5 0 0 ]\n"
LINES = [OUTPUT.format(0, "-1.5 2.25 3.000000"), OUTPUT.format(1, "4.000000 -5.000000 -6e0")]
EXPECTED = [[1.5, -2.25, 3.0], [-4.0, 5.0, -6.0]]  # RAS, so that LPS is (-1.5, 2.25, 3) and (4, -5, -6)


def markups(**changes: object) -> str:
    """Two points in a file of Slicer, in two markups of different systems."""
    first = {"label": "a", "position": [-1.5, 2.25, 3.0]}
    second = {"label": "b", "position": [-4, 5, -6.0], "positionStatus": "defined", "orientation": [1.0] * 9}
    unset = {"label": "c", "position": [0.0, 0.0, 0.0], "positionStatus": "undefined"}
    unplaced = {"label": "d", "positionStatus": "undefined"}
    lps = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": [first, unset]}
    ras = {"type": "Line", "coordinateSystem": "RAS", "coordinateUnits": ["mm", "UCUM", "millimeter"]}
    ras["controlPoints"] = [unplaced, {"label": "e"}, second]
    return json.dumps({"@schema": "any", "markups": [{**lps, **changes}, ras, {"type": "ROI"}]})


KNOWN = {
    "CSV": ("p.csv", "x,y,z,name\n1.5,-2.25,3,a\n-4,5,-6,b\n", None, ("a", "b")),
    "CSV of ANTs": ("p.csv", "x,y,z,t,label,comment\n-1.5,2.25,3,0,1,nan\n4,-5,-6,0,2,nan\n", "lps", ("1", "2")),
    "CSV of a spreadsheet": (
        "p.CSV",
        '\ufeffLabel, Z , "Y",X,mass\r\n"a,\r\n1", 3,-2.25,1.5,n/a\r\n\r\n,-6,5,-4,\r\n,,,,\r\n',
        "ras",
        ("a, 1", "2"),
    ),
    "CSV without header": ("p.csv", "1.5,-2.25, 3\n\n-4,+5,-6.0e0\n", None, ("1", "2")),
    "CSV without header, LPS": ("p.csv", "-1.5,2.25,3\n4,-5,-6\n", "lps", ("1", "2")),
    "fcsv, LPS": (
        "p.fcsv",
        FCSV.format("LPS", COLUMNS) + '0,-1.5,2.25,3,0,0,0,1,1,1,0,"a,1",,\n1,4,-5,-6,0,0,0,1,1,1,0,b,some, text\n',
        None,
        ("a,1", "b"),
    ),
    "fcsv, RAS": (
        "p.fcsv",
        FCSV.format("RAS", COLUMNS) + "F0,1.5,-2.25,3,0,0,0,1,1,1,0,a,,\nF1,-4,5,-6,0,0,0,1,1,1,0,b,,\n",
        "ras",
        ("a", "b"),
    ),
    "fcsv, 0 is RAS": ("p.fcsv", FCSV.format(0, COLUMNS) + "F0,1.5,-2.25,3\n,-4,5,-6,,,,,,,,b,,\n", None, ("1", "b")),
    "fcsv, 1 is LPS": ("p.fcsv", FCSV.format(1, COLUMNS) + "F0,-1.5,2.25,3\n,4,-5,-6\n", "lps", ("1", "2")),
    "fcsv of Slicer 5, with an undefined and a missing point": (
        "p.fcsv",
        FCSV.format("LPS", COLUMNS)
        + "1,-1.5,2.25,3,0,0,0,1,1,1,0,a,,,2,0\n2,0,0,0,0,0,0,1,1,1,0,no,,,0,0\n"
        + "3,4,-5,-6,0,0,0,1,1,1,0,b,,,2,0\n4,0,0,0,0,0,0,1,1,1,0,no,,,3,0\n",
        None,
        ("a", "b"),
    ),
    "fcsv of Slicer 3": (
        "p.fcsv",
        "# name = list\n# columns = label,x,y,z,sel,vis\na,1.5,-2.25,3,1,1\n\nb,-4,5,-6,1,1\n",
        None,
        ("a", "b"),
    ),
    "fcsv without a word": ("p.fcsv", "a,1.5,-2.25,3,1,1\nb,-4,5,-6,1,1\n", None, ("a", "b")),
    "markups": ("p.mrk.json", markups(), None, ("a", "b")),
    "markups, numbers for systems": ("p.mrk.json", markups(coordinateSystem=1), None, ("a", "b")),
    "elastix": ("p.txt", "point\n2\n-1.5 2.25 3.000000\n\n4\t-5  -6\n", None, ("1", "2")),
    "elastix, .pts": ("p.PTS", "Point \r\n 2\r\n-1.5 2.25 3\r\n4 -5 -6", "lps", ("1", "2")),
    "transformix": ("outputpoints.txt", "".join(LINES), None, ("1", "2")),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_files_have_these_points(case: str, tmp_path: Path) -> None:
    name, text, frame, names = KNOWN[case]
    landmarks = read_landmarks(save(tmp_path, name, text), frame=frame)
    assert landmarks.points_mm.dtype == torch.float64
    assert landmarks.points_mm.tolist() == EXPECTED
    assert landmarks.names == names


def test_markups_without_a_system_are_lps(tmp_path: Path) -> None:
    text = '{"markups": [{"controlPoints": [{"position": [1.0, 2, 3], "positionStatus": "preview"}]}]}'
    assert read_landmarks(save(tmp_path, "p.mrk.json", text)).points_mm.tolist() == [[-1.0, -2.0, 3.0]]


def test_two_columns_are_two_dimensions(tmp_path: Path) -> None:
    for text in ("x,y\n1,-2\n", "1,-2\n"):
        path = save(tmp_path, "p.csv", text)
        assert read_landmarks(path).points_mm.tolist() == [[1.0, -2.0]]
        assert read_landmarks(path, frame="lps", dims=2).points_mm.tolist() == [[-1.0, 2.0]]
    assert read_landmarks(save(tmp_path, "p.txt", "point\n1\n1 -2\n")).points_mm.tolist() == [[-1.0, 2.0]]
    line = "Point 0 ; InputIndex = [ 1 2 ] ; OutputPoint = [ 1 -2 ] ; Deformation = [ 0 0 ]"
    assert read_landmarks(save(tmp_path, "p.txt", line)).points_mm.tolist() == [[-1.0, 2.0]]


def test_a_third_coordinate_of_zero_is_none_in_two_dimensions(tmp_path: Path) -> None:
    flat, deep = save(tmp_path, "flat.csv", "x,y,z,t\n1,2,0,0\n3,4,0,0\n"), save(tmp_path, "deep.csv", "1,2,0\n3,4,5\n")
    assert read_landmarks(flat).points_mm.shape == (2, 3)
    assert read_landmarks(flat, dims=2).points_mm.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match=r"deep\.csv': expected 2D points, got 3D ones"):
        read_landmarks(deep, dims=2)
    with pytest.raises(ValueError, match=r"p\.csv': expected 3D points, got 2D ones"):
        read_landmarks(save(tmp_path, "p.csv", "1,2\n"), dims=3)


# Voxels, against SimpleITK


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("whole", [True, False])
def test_voxel_indices_lie_where_simpleitk_has_them(name: str, whole: bool, tmp_path: Path) -> None:
    dims = dims_of(name)
    index = np.random.default_rng(0).uniform(-3, 400, (9, dims))
    index = index.round() if whole else index.round(3)
    expected, affine = world(name, index), torch.from_numpy(AFFINES[name])
    rows = [[f"{value:g}" if whole else f"{value:.3f}" for value in row] for row in index.tolist()]
    files = {"p.csv": "\n".join(map(",".join, rows)), "p.pts": "\n".join(["index", "9", *map(" ".join, rows)])}
    for file, text in files.items():
        found = read_landmarks(save(tmp_path, file, text), affine, frame="voxel").points_mm
        np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)
    if dims == 3:
        one_based = "\n".join("\t".join(f"{value + 1:.3f}" for value in row) for row in index.tolist())
        found = read_landmarks(save(tmp_path, "p.txt", one_based), AFFINES[name]).points_mm
        np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", AFFINES)
def test_voxels_are_written_where_simpleitk_has_them(name: str, tmp_path: Path) -> None:
    index = np.random.default_rng(1).integers(0, 300, (6, dims_of(name))).astype(float)
    landmarks, affine = Landmarks(torch.from_numpy(world(name, index))), AFFINES[name]
    table = write_landmarks(landmarks, tmp_path / "p.csv", affine, frame="voxel").read_text().splitlines()[1:]
    np.testing.assert_allclose([[float(v) for v in row.split(",")[:-1]] for row in table], index, atol=1e-9)
    lines = write_landmarks(landmarks, tmp_path / "p.pts", affine, frame="voxel").read_text().splitlines()
    assert lines == ["index", "6", *(" ".join(f"{value:.0f}" for value in row) for row in index)]
    if dims_of(name) == 3:
        lines = write_landmarks(landmarks, tmp_path / "p.txt", affine, style="dirlab").read_text().splitlines()
        assert lines == [" ".join(f"{value + 1:.0f}" for value in row) for row in index]


# Round trips


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "file, options, has_names",
    [
        ("p.csv", {}, True),
        ("p.csv", {"frame": "lps"}, True),
        ("p.fcsv", {}, True),
        ("p.MRK.json", {}, True),
        ("p.pts", {}, False),
        ("p.txt", {"style": "elastix"}, False),
    ],
)
def test_millimeters_survive_to_the_last_bit(
    dims: int, file: str, options: dict[str, str], has_names: bool, tmp_path: Path
) -> None:
    landmarks = some_landmarks(dims)
    kept = landmarks.points_mm.clone()
    path = write_landmarks(landmarks, tmp_path / file, **options)
    again = read_landmarks(path, frame=options.get("frame"), dims=dims)
    assert path == tmp_path / file and list(tmp_path.iterdir()) == [path]
    assert torch.equal(again.points_mm, kept) and torch.equal(landmarks.points_mm, kept)
    assert again.names == (landmarks.names if has_names else tuple("1234567"))
    assert "-0.0" not in path.read_text(encoding="utf-8").replace("\n", ",").split(",")


@pytest.mark.parametrize("name", AFFINES)
def test_voxels_survive_on_any_grid(name: str, tmp_path: Path) -> None:
    landmarks, affine = some_landmarks(dims_of(name)), AFFINES[name]
    again = read_landmarks(write_landmarks(landmarks, tmp_path / "p.csv", affine, frame="voxel"), affine, "voxel")
    torch.testing.assert_close(again.points_mm, landmarks.points_mm, atol=1e-10, rtol=0)
    assert again.names == landmarks.names
    if dims_of(name) == 3:
        path = write_landmarks(landmarks, tmp_path / "p.txt", affine, style="dirlab")
        error = np.linalg.solve(
            affine[:3, :3], (read_landmarks(path, affine).points_mm - landmarks.points_mm).numpy().T
        )
        assert 1e-6 < np.abs(error).max() <= 5.1e-5  # half of the last of 4 decimals


def test_dirlab_writes_whole_indices_as_such(tmp_path: Path) -> None:
    landmarks = Landmarks(torch.tensor([[0.0, 4.0, 9.5], [1.0, 2.00001, 3.12341]]))
    path = write_landmarks(landmarks, tmp_path / "p.txt", np.diag([1.0, 2, 1, 1]), style="dirlab")
    assert path.read_text() == "1 3 10.5000\n2 2 4.1234\n"


def test_indices_a_hair_off_are_whole_and_no_zero_has_a_sign(tmp_path: Path) -> None:
    landmarks = Landmarks(torch.tensor([[-1e-7, 2 + 1e-7, 3 - 1e-7]], dtype=torch.float64))
    path = write_landmarks(landmarks, tmp_path / "p.pts", np.eye(4), frame="voxel")
    assert path.read_text() == "index\n1\n0 2 3\n"


def test_slicer_finds_what_it_asks_for(tmp_path: Path) -> None:
    """What its readers check: the schema, doubles in JSON, three header lines, columns by their place."""
    landmarks = Landmarks(torch.tensor([[1.0, -2.0, 3.0]]), ("a, b",))
    content = json.loads(write_landmarks(landmarks, tmp_path / "p.mrk.json").read_text())
    assert content["@schema"].endswith("/markups-schema-v1.0.0.json#")
    (markup,) = content["markups"]
    assert (markup["type"], markup["coordinateSystem"]) == ("Fiducial", "LPS")
    (point,) = markup["controlPoints"]
    assert point == {"id": "1", "label": "a, b", "position": [-1.0, 2.0, 3.0], "positionStatus": "defined"}
    assert all(isinstance(value, float) for value in point["position"])
    lines = write_landmarks(landmarks, tmp_path / "p.fcsv").read_text().splitlines()
    assert lines[0].startswith("# Markups fiducial file version = 4.")
    assert lines[1:] == ["# CoordinateSystem = LPS", f"# columns = {COLUMNS}", lines[3]]
    row = dict(zip(COLUMNS.split(","), next(csv.reader([lines[3]]))))
    assert [row[key] for key in ("x", "y", "z", "label", "desc")] == ["-1.0", "2.0", "3.0", "a, b", ""]


def test_ants_finds_coordinates_first(tmp_path: Path) -> None:
    path = write_landmarks(Landmarks(torch.tensor([[1.0, -2.0, 3.0]]), ("a",)), tmp_path / "p.csv", frame="lps")
    assert path.read_text() == "x,y,z,name\n-1.0,2.0,3.0,a\n"


@pytest.mark.parametrize(
    "points, mask, second",
    [
        ("3DCT_lung_baseline_landmarks.txt", "3DCT_lung_baseline_mask.mha", [-98.883, 26.046, -1324.5]),
        ("3DCT_lung_groundtruth_point.txt", "3DCT_lung_followup_mask.mha", [-95.66, 45.656, -1302.0]),
    ],
)
def test_real_landmarks_of_elastix_lie_in_their_lungs(
    points: str, mask: str, second: list[float], shared_data: Path
) -> None:
    landmarks = read_landmarks(shared_data / "lung_elastix" / points, dims=3)
    assert landmarks.points_mm.shape == (100, 3) and landmarks.points_mm[1].tolist() == second
    image = sitk.ReadImage(str(shared_data / "lung_elastix" / mask))
    flip = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = flip @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = flip @ image.GetOrigin()
    inside = ~outside_image(landmarks.points_mm, affine, image.GetSize())
    assert int(inside.sum()) == 51  # the images are cropped to one lung
    lps = (landmarks.points_mm[inside].numpy() @ flip).tolist()
    assert all(image[image.TransformPhysicalPointToIndex(point)] > 0 for point in lps)
    with pytest.raises(ValueError, match=r"49 of 100 points lie outside .* '2', at \(-9.*\.00\)\.$"):
        check_inside(landmarks, affine, image.GetSize(), points)


# Inside and outside


@pytest.mark.parametrize("name", AFFINES)
def test_outside_begins_half_a_voxel_beyond_the_last(name: str) -> None:
    dims, shape = dims_of(name), (5, 9, 2)[: dims_of(name)]
    corner = np.array(shape) - 0.5
    index = np.stack([np.full(dims, -0.5), corner, np.zeros(dims), np.full(dims, -0.5), corner, corner * np.nan])
    index[3, dims - 1] -= 1e-3
    index[4, 0] += 1e-3
    points = index @ AFFINES[name][:dims, :dims].T + AFFINES[name][:dims, -1]
    found = outside_image(torch.from_numpy(points), AFFINES[name], shape)
    assert found.dtype == torch.bool and found.tolist() == [False, False, False, True, True, True]


def test_points_outside_are_counted_and_the_first_is_named() -> None:
    affine = make_affine((2, 2, 2), (10, 20, 30))
    landmarks = Landmarks(torch.tensor([[11.0, 20, 30], [11, 20, 24], [9, 29.5, 30]]), ("in", "below", "beside"))
    with pytest.raises(ValueError, match=r"'p\.csv': 2 of 3 points .* shape \[3, 4, 4\]") as caught:
        check_inside(landmarks, affine, (3, 4, 4), "p.csv")
    assert "'below', at (11.00, 20.00, 24.00) mm RAS+, voxel (0.50, 0.00, -3.00)" in str(caught.value)
    assert "flipped" not in str(caught.value) and "voxel indices" not in str(caught.value)
    check_inside(Landmarks(landmarks.points_mm[:1]), affine, (3, 4, 4), "p.csv")


@pytest.mark.parametrize("name", ["LPS, anisotropic", "oblique", "2D oblique, flipped", "2D, 4x4"])
def test_the_other_of_ras_and_lps_is_suspected(name: str) -> None:
    dims, shape = dims_of(name), (5, 9, 4)[: dims_of(name)]
    index = np.random.default_rng(5).uniform(0, 1, (8, dims)) * (np.array(shape) - 1)
    points = torch.from_numpy(world(name, index))
    check_inside(Landmarks(points), AFFINES[name], shape, "p.csv")
    points[:, :2] *= -1
    with pytest.raises(ValueError, match="the file seems to be in the other of RAS and LPS"):
        check_inside(Landmarks(points), AFFINES[name], shape, "p.csv")
    points[0, 0] += 1000
    with pytest.raises(ValueError, match=r"of 8 points lie outside .*\)\.$"):
        check_inside(Landmarks(points), AFFINES[name], shape, "p.csv")
    with pytest.raises(ValueError, match=r"may need frame='voxel'"):
        check_inside(Landmarks(torch.from_numpy(index)), AFFINES[name], shape, "p.csv")


def test_images_of_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'p\.csv': expected 2D points, as the image is, got 3D ones"):
        check_inside(Landmarks(torch.zeros(1, 3)), np.eye(4), (4, 4), "p.csv")
    with pytest.raises(ValueError, match=r"expects points \(N, 2\) for the shape \[4, 4\], got \[1, 3\]"):
        outside_image(torch.zeros(1, 3), np.eye(4), (4, 4))


# What is refused


def test_landmarks_are_checked() -> None:
    good = torch.zeros(2, 3)
    for points in (good[0], good[:0], torch.zeros(2, 4), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match=r"shape \(N, 2\) or \(N, 3\), got \["):
            Landmarks(points)
    for value in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match="finite points"):
            Landmarks(torch.full((2, 3), value))
    with pytest.raises(ValueError, match="a name for each of 2 points, got 1 names"):
        Landmarks(good, ("a",))
    with pytest.raises(ValueError, match="names of one line each"):
        Landmarks(good, ("a", "b\nc"))
    kept = Landmarks(MetaTensor(torch.zeros(2, 3, dtype=torch.float16)), ["a", "b"])
    assert type(kept.points_mm) is torch.Tensor and kept.points_mm.dtype == torch.float64
    assert kept.names == ("a", "b")


BAD = {
    "no such format": ("p.xlsx", "1,2,3", r"p\.xlsx': expected a landmark file ending in \.csv"),
    "JSON of another kind": ("p.json", "[]", r"ending in \.csv, \.fcsv, \.mrk\.json, \.pts, \.txt"),
    "suffix alone": (".csv", "1,2,3", "expected a landmark file ending in"),
    "empty": ("p.csv", " \n\n", r"p\.csv': expected landmarks, got an empty file"),
    "binary": ("p.csv", b"\x00\x01\x02", "got binary data"),
    "bytes": ("p.txt", b"\xff\xfe1\x00", "expected landmarks as text in UTF-8, got other bytes"),
    "commas only": ("p.csv", ",,\n,,\n", r"p\.csv': expected at least one point, got none"),
    "header only": ("p.csv", "x,y,z\n", "expected at least one point"),
    "no y": ("p.csv", "\nx,z,name\n1,2,a\n", r"p\.csv', line 2: expected a header with one column x.*'x', 'z', 'name'"),
    "two x": ("p.csv", "x,y,z,x\n1,2,3,4\n", "line 1: expected a header with one column x"),
    "semicolons": ("p.csv", "x;y;z\n1;2;3\n", "line 1: .*separated by commas"),
    "ragged CSV": ("p.csv", "x,y,z\n1,2,3\n1,2\n", r"p\.csv', line 3: expected 3 cells, as in the header, got 2"),
    "ragged, no header": ("p.csv", "1,2,3\n\n1,2\n", r"p\.csv', line 3: expected 3 coordinates, as before, got 2"),
    "four numbers": ("p.csv", "1,2,3,4\n", "line 1: expected 2 or 3 coordinates, got 4"),
    "one number": ("p.csv", "1\n", "line 1: expected 2 or 3 coordinates, got 1"),
    "word": ("p.csv", "x,y,z\n1,2,3\n1,two,3\n", "line 3: expected a finite number as coordinate, got 'two'"),
    "cell left empty": ("p.csv", "x,y,z\n1,,3\n", "line 2: expected a finite number as coordinate, got ''"),
    "underscore": ("p.csv", "x,y\n1_0,3\n", "line 2: expected a finite number as coordinate, got '1_0'"),
    "NaN": ("p.csv", "1,2,nan\n", "line 1: expected a finite number as coordinate, got 'nan'"),
    "infinity": (
        "p.txt",
        "point\n1\n1 2 -inf\n",
        r"p\.txt', line 3: expected a finite number as coordinate, got '-inf'",
    ),
    "giant cell": ("p.csv", "x,y\n" + "1" * 200_000 + ",2\n", "expected comma-separated values, got an error"),
    "fcsv, unknown system": ("p.fcsv", FCSV.format("IJK", COLUMNS), "line 2: .*system LPS or RAS, got 'IJK'"),
    "fcsv, no system": (
        "p.fcsv",
        "# Markups fiducial file version = 5.0\n1,2,3,4\n",
        "line 2: expected '# CoordinateSys",
    ),
    "fcsv, no z": (
        "p.fcsv",
        FCSV.format("LPS", "id,x,y,label") + "1,2,3,a\n",
        "line 4: expected the columns .* no z in",
    ),
    "fcsv, short": ("p.fcsv", FCSV.format("LPS", COLUMNS) + "1,2,3\n", "line 4: expected the columns .* got no z in"),
    "fcsv, word": ("p.fcsv", FCSV.format("LPS", COLUMNS) + "1,2,3,up\n", "line 4: expected a finite number.*'up'"),
    "fcsv, no points": ("p.fcsv", FCSV.format("LPS", COLUMNS), "expected at least one point"),
    "markups, no JSON": ("p.mrk.json", '{\n"markups": [}', r"p\.mrk\.json': expected JSON, got an error: .*line 2"),
    "markups, a list": ("p.mrk.json", "[1]", "expected a list of Slicer markups as 'markups'"),
    "markups, a number": ("p.mrk.json", '{"markups": [1]}', "expected a list of Slicer markups as 'markups'"),
    "markups, unknown system": ("p.mrk.json", markups(coordinateSystem="IJK"), "markup 1: .* LPS or RAS, got 'IJK'"),
    "markups, other unit": (
        "p.mrk.json",
        markups(coordinateUnits="um"),
        "markup 1: expected coordinateUnits of mm, got",
    ),
    "markups, no list": ("p.mrk.json", markups(controlPoints={}), "markup 1: expected a list of points as"),
    "markups, two coordinates": (
        "p.mrk.json",
        markups(controlPoints=[{"label": "a"}, {"position": [1.0, 2.0]}]),
        r"p\.mrk\.json', markup 1, point 2: expected a position of 3 numbers, got \[1.0, 2.0\]",
    ),
    "markups, defined but not there": (
        "p.mrk.json",
        markups(controlPoints=[{"positionStatus": "defined"}]),
        "markup 1, point 1: expected a position of 3 numbers, got None",
    ),
    "markups, null": (
        "p.mrk.json",
        markups(controlPoints=[{"position": [None, True, 10**400]}]),
        "markup 1, point 1: expected a finite number as coordinate, got None",
    ),
    "markups, a truth": ("p.mrk.json", markups(controlPoints=[{"position": [1.0, True, 2.0]}]), "coordinate, got True"),
    "markups, NaN": (
        "p.mrk.json",
        markups(controlPoints=[{"position": [1, 2, torch.nan]}]),
        "a finite number.*got nan",
    ),
    "markups, undefined only": (
        "p.mrk.json",
        '{"markups": [{"controlPoints": [{"positionStatus": "missing", "position": [0, 0, 0]}]}]}',
        "expected at least one point",
    ),
    "elastix, count too high": ("p.txt", "point\n3\n1 2 3\n4 5 6\n", "line 2: expected as many points .*, 3, got 2"),
    "elastix, count too low": ("p.pts", "point\n1\n1 2 3\n4 5 6\n", r"p\.pts', line 2: expected as many .*, 1, got 2"),
    "elastix, no count": (
        "p.txt",
        "point\n1 2 3\n",
        "line 2: expected the number of points below 'point', got '1 2 3'",
    ),
    "elastix, first line alone": ("p.txt", "index\n", r"p\.txt': expected the number of points below 'index', got ''"),
    "elastix, none": ("p.txt", "point\n0\n", "expected at least one point, got none"),
    "elastix, ragged": ("p.txt", "point\n2\n1 2\n1 2 3\n", "line 4: expected 2 coordinates, as before, got 3"),
    "elastix, four": ("p.txt", "point\n1\n1 2 3 4\n", "line 3: expected 2 or 3 coordinates, got 4"),
    "elastix, a comma": ("p.txt", "point\n1\n1,5 2 3\n", "line 3: expected a finite number as coordinate, got '1,5'"),
    "elastix, no affine": ("p.txt", "index\n1\n1 2 3\n", r"p\.txt' counts voxels: expected the affine .* got none"),
    ".pts without its first line": (
        "p.pts",
        "1 2 3\n",
        "line 1: expected 'point', 'index' or a line of .*, got '1 2 3'",
    ),
    "text": (
        "p.txt",
        "\nHello world\n",
        "line 2: expected 'point', 'index' .* or three voxel indices, got 'Hello world'",
    ),
    "transformix, cut off": ("p.txt", LINES[0] + LINES[1][:60], r"p\.txt', line 2: expected 'OutputPoint = "),
    "transformix, nothing in it": ("p.txt", OUTPUT.format(0, ""), "line 1: expected 2 or 3 coordinates, got 0"),
    "DIR-Lab, no affine": ("p.txt", "1 2 3\n", r"p\.txt' counts voxels: expected the affine of their image, got none"),
    "DIR-Lab, two columns": ("p.txt", "1 2\n", "line 1: expected 3 voxel indices, as DIR-Lab writes, got 2"),
    "DIR-Lab, ragged": ("p.txt", "1 2 3\n4 5 6 7\n", "line 2: expected 3 voxel indices, as DIR-Lab writes, got 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_error(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_landmarks(path)
    assert f"'{path}'" in str(caught.value)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, reason in {"missing.csv": "No such file", "folder.csv": "Is a directory|Permission denied"}.items():
        with pytest.raises(ValueError, match=f"Cannot read landmarks from '.*{name}': ({reason})"):
            read_landmarks(tmp_path / name)


def test_frames_and_affines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table, slicer = (
        save(tmp_path, "p.csv", "1,2,3\n"),
        save(tmp_path, "p.fcsv", FCSV.format("LPS", COLUMNS) + "1,1,2,3\n"),
    )
    dirlab = save(tmp_path, "p.txt", "1 2 3\n")
    for path, frame, message in [
        (table, "RAS", r"p\.csv' expects the frame 'ras', 'lps' or 'voxel', got 'RAS'"),
        (slicer, "ras", r"p\.fcsv', line 4: the file says that points are 'lps', got frame='ras'"),
        (dirlab, "voxel", r"p\.txt', line 1: the file says that points are 'voxel from 1', got frame='voxel'"),
        (table, "voxel", r"p\.csv' counts voxels: expected the affine of their image, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_landmarks(path, frame=frame)
    for affine, message in [
        (np.eye(3), r"p\.csv' holds 3D voxel indices: .*got \(3, 3\)"),
        (np.zeros((4, 4)), r"p\.csv' holds 3D voxel indices: .*positive spacing"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_landmarks(table, affine, frame="voxel")


ONE = Landmarks(torch.tensor([[1.0, 2.0, 3.5]]))
UNWRITABLE = {
    "suffix": (ONE, "p.vtk", {}, "expected a landmark file ending in"),
    "style missing": (ONE, "p.txt", {}, r"p\.txt' may be written in the style 'elastix' or 'dirlab', got None"),
    "style of another": (ONE, "p.csv", {"style": "dirlab"}, "may be written in the style 'csv', got 'dirlab'"),
    ".pts is elastix": (ONE, "p.pts", {"style": "dirlab"}, "may be written in the style 'elastix', got 'dirlab'"),
    "frame unknown": (ONE, "p.csv", {"frame": "mni"}, "may hold points as 'ras' or 'lps' or 'voxel', got frame='mni'"),
    "frame of another": (ONE, "p.fcsv", {"frame": "ras"}, r"p\.fcsv' may hold points as 'lps', got frame='ras'"),
    "no folder": (ONE, "none/p.csv", {}, "a folder that exists"),
    "no affine": (ONE, "p.txt", {"style": "dirlab"}, "counts voxels: expected the affine of their image, got none"),
    "wrong affine": (ONE, "p.csv", {"frame": "voxel", "affine": np.eye(3)}, r"holds 3D voxel indices: .*\(3, 3\)"),
    "index not whole": (ONE, "p.pts", {"frame": "voxel", "affine": np.eye(4)}, "whole voxel indices"),
    "DIR-Lab in 2D": (
        Landmarks(torch.ones(1, 2)),
        "p.txt",
        {"style": "dirlab", "affine": np.eye(3)},
        "expects 3D points",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_one_clear_error_and_no_file(case: str, tmp_path: Path) -> None:
    landmarks, name, options, message = UNWRITABLE[case]
    with pytest.raises(ValueError, match=message) as caught:
        write_landmarks(landmarks, tmp_path / name, **options)
    assert f"'{tmp_path / name}'" in str(caught.value)
    assert list(tmp_path.rglob("*")) == []


def test_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_landmarks(ONE, tmp_path / "p.mrk.json")
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"cannot write the landmarks: No space left on device: .*p\.mrk\.json"):
        write_landmarks(Landmarks(ONE.points_mm + 1), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
