"""The command `equireg`: what it writes, what it says, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers_bundle import blob, random_weights
from helpers_grids import field, grid, lps
from monai.data import MetaTensor
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation
from test_registration import anatomy

import equireg
from equireg.cli import COMMANDS, main
from equireg.images import read_image, write_image
from equireg.io import write_displacement_field
from equireg.landmarks import Landmarks, read_landmarks, write_landmarks
from equireg.transform_files import read_affine, read_transform, write_affine
from equireg.world import invert_field, map_points, sample_transform, warp_image


def run(*words: object) -> int:
    """Run the command in this process; return its exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two 2D images on grids of their own, labels, landmarks, a list of pairs, and weights."""
    folder = tmp_path_factory.mktemp("scans")
    affines = {"moving": np.diag([1.2, 0.9, 1.0, 1.0]), "fixed": np.diag([-1.0, 1.0, 1.0, 1.0])}
    affines["fixed"][:2, 3] = (60.0, -20.0)
    for name, affine in affines.items():
        values = blob((30, 28), (14, 13), 9, seed=len(name))
        write_image(MetaTensor(torch.from_numpy(values)[None], affine=affine), folder / f"{name}.nii.gz")
        label = MetaTensor(torch.from_numpy((values > 60).astype(np.uint8) + (values > 0))[None], affine=affine)
        write_image(label.to(torch.uint8), folder / f"{name}_label.nii.gz")
        points = torch.from_numpy(np.array([[12.0, 13.0], [16.0, 11.0]]) @ affine[:2, :2].T + affine[:2, 3])
        write_landmarks(Landmarks(points, ("tip", "fork")), folder / f"{name}.csv")
    random_weights(folder / "weights.pt", 2)
    rows = ["name,moving,fixed,moving_label,fixed_label,moving_points,fixed_points"]
    rows += [
        f"{n},moving.nii.gz,fixed.nii.gz,moving_label.nii.gz,fixed_label.nii.gz,moving.csv,fixed.csv" for n in "ab"
    ]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def register_words(scans: Path, output: Path, *more: object) -> list[object]:
    words = ["register", "--moving", scans / "moving.nii.gz", "--fixed", scans / "fixed.nii.gz", "--output", output]
    return [*words, "--weights", scans / "weights.pt", *more]


def test_register_writes_all_it_promises(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [word for name in ("moving", "fixed") for word in (f"--{name}_label", scans / f"{name}_label.nii.gz")]
    points = [word for name in ("moving", "fixed") for word in (f"--{name}_points", scans / f"{name}.csv")]
    exports = ["--exports", "h5,affine,learn2reg", "--optimize", 2]
    assert run(*register_words(scans, tmp_path / "out", *labels, *points, *exports)) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("moved.nii.gz", "fixed_to_moving.nii.gz", "moving_to_fixed.nii.gz", "moved_label.nii.gz", "qc.png"),
        *("moved_points.csv", "fixed_points_in_moving.csv", "report.json", "affine.tfm"),
        *("fixed_to_moving.h5", "moving_to_fixed.h5", "disp_fixed_moving.nii.gz"),
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = capsys.readouterr().out
    assert f"{report['overlap']['dice']:.3f} after" in told and f"{report['landmarks']['tre_mm']:.2f} mm after" in told
    assert report["options"]["optimize"] == 2 and report["options"]["method"] == "field"
    # The fields lie on the grids they are said to lie on.
    for name, image in (("fixed_to_moving", "fixed"), ("moving_to_fixed", "moving")):
        one, other = (
            sitk.ReadImage(str(path)) for path in (tmp_path / "out" / f"{name}.nii.gz", scans / f"{image}.nii.gz")
        )
        assert one.GetSize() == other.GetSize() and np.allclose(one.GetOrigin(), other.GetOrigin())
        assert np.allclose(one.GetDirection(), other.GetDirection()) and np.allclose(
            one.GetSpacing(), other.GetSpacing()
        )


def test_warp_brings_images_labels_and_points_where_register_does(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--moving_label", scans / "moving_label.nii.gz", "--moving_points", scans / "moving.csv", "--nopicture"]
    assert run(*register_words(scans, out, *more)) == 0
    transform, reference = out / "fixed_to_moving.nii.gz", scans / "fixed.nii.gz"
    words = ["warp", "--transform", transform, "--reference", reference, "--output"]
    assert run(*words, tmp_path / "moved.nii.gz", "--image", scans / "moving.nii.gz") == 0
    assert run(*words, tmp_path / "l.nrrd", "--image", scans / "moving_label.nii.gz", "--interpolation", "nearest") == 0
    moved = nib.load(tmp_path / "moved.nii.gz").get_fdata()
    assert np.abs(moved - nib.load(out / "moved.nii.gz").get_fdata()).max() < 1e-3
    label = sitk.ReadImage(str(tmp_path / "l.nrrd"))
    assert "integer" in label.GetPixelIDTypeAsString()
    assert np.array_equal(sitk.GetArrayFromImage(label).T, nib.load(out / "moved_label.nii.gz").get_fdata())
    words = ["warp", "--points", scans / "moving.csv", "--transform", out / "moving_to_fixed.nii.gz", "--output"]
    assert run(*words, tmp_path / "points.fcsv") == 0
    found, expected = (read_landmarks(path, dims=2) for path in (tmp_path / "points.fcsv", out / "moved_points.csv"))
    assert (found.points_mm - expected.points_mm).abs().max() < 1e-3 and found.names == ("tip", "fork")
    before = tmp_path.stat().st_mtime
    assert run(*words, tmp_path / "no" / "points.csv") == 1 and tmp_path.stat().st_mtime == before


def known_image(data: Path | None) -> np.ndarray:
    """Return an image with background 0 all around: a made-up organ, or a hippocampus."""
    if data is None:
        return anatomy()
    path = sorted((data / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[3]
    return np.pad(nib.load(path).get_fdata(dtype=np.float32), 8)


@pytest.mark.parametrize("kind", ["made up", "hippocampus"])
def test_a_known_rotation_is_recovered_with_sign_in_millimeters(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Turned by scipy, not by us, and stored from right to left: the affine that fits best is that rotation."""
    values = known_image(request.getfixturevalue("shared_data") if kind == "hippocampus" else None)
    turn = Rotation.from_rotvec(np.deg2rad(8) * np.array([0.6, 0.0, 0.8])).as_matrix()
    middle = np.array(values.shape) / 2 - 0.5
    turned = affine_transform(values, turn, middle - turn @ middle, order=1)
    turned[turned < 0.05 * values.max()] = 0
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [200.0, -30.0, 10.0]
    for name, array in (("moving", values), ("fixed", turned)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    files = [word for name in ("moving", "fixed") for word in (f"--{name}", tmp_path / f"{name}.nii.gz")]
    words = ["register", *files, "--weights", "hippocampus", "--optimize", 40, "--exports", "affine", "--nopicture"]
    assert run(*words, "--output", tmp_path / "out") == 0
    rotation = np.eye(4)
    rotation[:3, :3], rotation[:3, 3] = turn, middle - turn @ middle
    rotation = affine @ rotation @ np.linalg.inv(affine)  # of points of the world, not of indices
    world = affine[:3, :3] @ np.argwhere(turned > 0).T + affine[:3, 3:]

    def apart(matrix: np.ndarray) -> float:
        """Mean distance in millimeters between where a matrix and the rotation take the content."""
        return np.linalg.norm((matrix - rotation)[:3, :3] @ world + (matrix - rotation)[:3, 3:], axis=0).mean()

    found = read_affine(tmp_path / "out" / "affine.tfm").numpy()
    assert apart(np.eye(4)) > 1.4 and apart(np.linalg.inv(rotation)) > 2.8 and apart(found) < 0.5


def test_a_known_translation_is_recovered_with_sign_in_millimeters(tmp_path: Path) -> None:
    """The same organ twice, one of them moved in the world by its header: what lies between them is that move."""
    values, shift = anatomy(), np.array([412.0, -77.5, 33.25])
    affines = {"fixed": grid(3, 2, (1.0, 1.0, 1.0)), "moving": grid(3, 2, (1.0, 1.0, 1.0))}
    affines["moving"][:3, 3] += shift
    found = {}
    for name, affine in affines.items():
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
    for name in affines:
        pair = ["--moving", tmp_path / f"{name}.nii.gz", "--fixed", tmp_path / "fixed.nii.gz"]
        assert run("register", *pair, "--weights", "hippocampus", "--output", tmp_path / name, "--nopicture") == 0
        (found[name],) = read_transform(tmp_path / name / "fixed_to_moving.nii.gz")
    points = torch.from_numpy(np.argwhere(values > 0) @ affines["fixed"][:3, :3].T + affines["fixed"][:3, 3])
    apart, alone = (map_points(points, [found[name]]).numpy() for name in ("moving", "fixed"))
    assert np.abs(apart - alone - shift).max() < 1e-3
    assert np.linalg.norm(apart - points.numpy() - shift, axis=1).mean() < 0.5


def test_compose_invert_and_affine_against_points(tmp_path: Path) -> None:
    shape, affine = (17, 15, 13), np.diag([1.0, 1.5, 2.0, 1.0])
    there = field(shape, affine, 3, strength=0.5)
    write_displacement_field(there, affine, tmp_path / "field.nii.gz")
    turn = np.eye(4)
    turn[:3, :3] = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    turn[:3, 3] = [5.0, -6.0, 7.0]
    write_affine(torch.from_numpy(turn), tmp_path / "turn.tfm")
    write_image(MetaTensor(torch.rand(1, *shape), affine=affine), tmp_path / "grid.nii.gz")
    points = torch.tensor([[6.0, 9.0, 12.0], [8.0, 7.5, 10.0]], dtype=torch.float64)
    expected = map_points(points, [there, torch.from_numpy(turn)])
    both = f"{tmp_path / 'field.nii.gz'},{tmp_path / 'turn.tfm'}"
    for name in ("chain.nii.gz", "chain.h5"):
        more = ["--reference", tmp_path / "grid.nii.gz"] if name.endswith("gz") else []
        assert run("compose", "--transforms", both, "--output", tmp_path / name, *more) == 0
        assert (map_points(points, read_transform(tmp_path / name)) - expected).abs().max() < 1e-3
    composite = sitk.ReadTransform(str(tmp_path / "chain.h5"))
    theirs = np.array([composite.TransformPoint((p * lps(3)).tolist()) for p in points.numpy()]) * lps(3)
    assert np.abs(theirs - expected.numpy()).max() < 1e-3
    target = MetaTensor(torch.rand(1, 30, 30, 30), affine=torch.from_numpy(np.diag([1.0, 1.0, 1.0, 1.0])))
    target.affine[:3, 3] = torch.tensor([-25.0, -10.0, 5.0])
    write_image(target, tmp_path / "target.nii.gz")
    words = ["invert", "--transform", both, "--reference", tmp_path / "target.nii.gz", "--output"]
    assert run(*words, tmp_path / "back.nii.gz") == 0
    assert (map_points(expected, read_transform(tmp_path / "back.nii.gz")) - points).abs().max() < 0.05
    assert run("invert", "--transform", tmp_path / "turn.tfm", "--output", tmp_path / "turned_back.tfm") == 0
    assert np.abs(read_affine(tmp_path / "turned_back.tfm").numpy() @ turn - np.eye(4)).max() < 1e-9
    assert run("affine", "--transform", tmp_path / "chain.nii.gz", "--output", tmp_path / "fit.mat") == 0
    assert np.abs(read_affine(tmp_path / "fit.mat").numpy()[:3, :3] - turn[:3, :3]).max() < 0.2
    assert run("invert", "--transform", both, "--output", tmp_path / "x.nii.gz") == 1
    assert run("compose", "--transforms", both, "--output", tmp_path / "x.nii.gz") == 1
    assert run("affine", "--transform", tmp_path / "turn.tfm", "--output", tmp_path / "x.tfm") == 1


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_batch_goes_on_skips_and_tells_what_failed(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"no image at all")
    listed = [
        {"name": name, "moving": str(scans / "moving.nii.gz"), "fixed": str(scans / "fixed.nii.gz")} for name in "xyz"
    ]
    listed[1]["moving"] = str(tmp_path / "broken.nii.gz")
    (tmp_path / "pairs.json").write_text(json.dumps(listed))
    words = [
        "batch",
        "--pairs",
        tmp_path / "pairs.json",
        "--output",
        tmp_path / "out",
        "--weights",
        scans / "weights.pt",
    ]
    assert run(*words, "--nopicture") == 1
    told = capsys.readouterr()
    assert "2 registered, 0 done before, 1 failed" in told.out
    assert "1 of 3 pairs failed" in told.err and "broken.nii.gz" in told.err and "Traceback" not in told.err
    assert [row["status"] for row in rows_of(tmp_path / "out" / "batch.csv")] == ["registered", "failed", "registered"]
    assert not (tmp_path / "out" / "y").exists() or list((tmp_path / "out" / "y").iterdir()) == []
    times = {name: (tmp_path / "out" / name / "report.json").stat().st_mtime_ns for name in "xz"}
    listed[1]["moving"] = str(scans / "fixed.nii.gz")
    (tmp_path / "pairs.json").write_text(json.dumps(listed))
    assert run(*words, "--nopicture") == 0
    assert "1 registered, 2 done before, 0 failed" in capsys.readouterr().out
    assert times == {name: (tmp_path / "out" / name / "report.json").stat().st_mtime_ns for name in "xz"}
    # Other options, results that are missing, or a file that is another one are another piece of work.
    assert run(*words, "--nopicture", "--exports", "affine") == 0 and "3 registered, 0 done" in capsys.readouterr().out
    assert run(*words, "--nopicture") == 0 and "0 registered, 3 done" in capsys.readouterr().out
    (tmp_path / "out" / "z" / "moved.nii.gz").unlink()
    assert run(*words, "--nopicture") == 0 and "1 registered, 2 done" in capsys.readouterr().out
    assert run(*words, "--nopicture", "--spacing", 2) == 0 and "3 registered, 0 done" in capsys.readouterr().out
    other = tmp_path / "other.nii.gz"
    other.write_bytes((scans / "fixed.nii.gz").read_bytes())
    (tmp_path / "pairs.json").write_text(json.dumps([{**listed[0], "moving": str(other)}]))
    assert run(*words, "--nopicture") == 0 and "1 registered, 0 done" in capsys.readouterr().out
    other.write_bytes((scans / "moving.nii.gz").read_bytes())
    os.utime(other, (1e9, 1e9))  # older than the results, and not what they were made of
    assert run(*words, "--nopicture") == 0 and "1 registered, 0 done" in capsys.readouterr().out


def test_pairs_of_one_name_are_refused(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = f"{scans / 'moving.nii.gz'},{scans / 'fixed.nii.gz'}"
    for text, message in (
        (f"moving,fixed\n{row}\n{row}\n", "'moving_to_fixed'"),
        (f"name,moving,fixed\n../a,{row}\n", "../a"),
    ):
        (tmp_path / "pairs.csv").write_text(text)
        assert run("batch", "--pairs", tmp_path / "pairs.csv", "--output", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lists_are_checked_and_missing_files_fail_their_pair(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"{scans / 'moving.nii.gz'},{scans / 'fixed.nii.gz'}"
    words = [
        "batch",
        "--pairs",
        tmp_path / "pairs.csv",
        "--output",
        tmp_path / "out",
        "--weights",
        scans / "weights.pt",
    ]
    for text, message in (
        (f"moving,fixed,moving_lable\n{files},x.nii.gz\n", "did you mean 'moving_label'"),
        (f"moving,fixed,fixed_thing\n{files},x.nii.gz\n", "'fixed_thing', which means nothing"),
        (f"moving;fixed\n{files.replace(',', ';')}\n", "separated by commas"),
    ):
        (tmp_path / "pairs.csv").write_text(text)
        assert run(*words) == 1 and message in capsys.readouterr().err
    text = f"name,moving,fixed,age,similarity_mask\na,{files},7,\nb,{files},8,gone.nii.gz\n"
    (tmp_path / "pairs.csv").write_text(text)
    assert run(*words, "--nopicture") == 1
    told = capsys.readouterr()
    assert "1 registered, 0 done before, 1 failed" in told.out and str(tmp_path / "gone.nii.gz") in told.err


def test_doubts_are_told_and_kept(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of random numbers registers nothing; whoever runs it should hear so."""
    assert run(*register_words(scans, tmp_path / "out", "--fixed_label", scans / "fixed_label.nii.gz")) == 0
    told = capsys.readouterr().err
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert warnings and all(f"warning: {warning}" in told for warning in warnings)
    assert any("folds in" in warning for warning in warnings) and any("no moving one" in w for w in warnings)
    pair = [word for name in ("moving", "fixed") for word in (f"--{name}", scans / f"{name}.nii.gz")]
    assert run("register", *pair, "--weights", "vessels", "--spacing", "1", "--output", tmp_path / "far") == 0
    assert "which was trained on about 96" in capsys.readouterr().err


def test_the_home_folder_and_switches_are_understood(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, switch in enumerate((["--nopicture"], ["--no-picture"], ["--picture", "False"], ["--picture=false"])):
        words = [word for word in register_words(scans, Path("~") / f"out{number}") if word != "--output"]
        words = [f"--output={word}" if str(word).startswith("~") else word for word in words]
        assert run(*words, *switch) == 0
        assert (tmp_path / f"out{number}" / "report.json").exists()
        assert not (tmp_path / f"out{number}" / "qc.png").exists()
    assert run("--version") == 0 and equireg.__version__ in capsys.readouterr().out


def test_evaluate_measures_a_list_and_foreign_transforms(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "--pairs",
        scans / "pairs.csv",
        "--output",
        tmp_path / "out",
        "--weights",
        scans / "weights.pt",
    ]
    assert run(*words, "--nopicture") == 0
    rows = rows_of(tmp_path / "out" / "evaluation.csv")
    assert [row["name"] for row in rows] == ["a", "b"]
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())["summary"]
    for measure in ("dice", "dice_1", "hd95_mm", "tre_mm", "folding_percent", "sd_log_jacobian", "seconds"):
        assert float(rows[0][measure]) >= 0 and summary[measure]["count"] == 2
    assert summary["dice"]["sd"] == 0.0 and summary["dice"]["mean"] == pytest.approx(float(rows[0]["dice"]))
    assert "inverse_consistency_mm" in rows[0] and "dice" in capsys.readouterr().out
    # The numbers are those of the files: measured once more by hand.
    (step,) = read_transform(tmp_path / "out" / "a" / "fixed_to_moving.nii.gz")
    moved = warp_image(read_image(scans / "moving_label.nii.gz"), step, "nearest").numpy()
    target = read_image(scans / "fixed_label.nii.gz").numpy()
    dice = [2 * ((moved == k) & (target == k)).sum() / ((moved == k).sum() + (target == k).sum()) for k in (1, 2)]
    assert np.mean(dice) == pytest.approx(float(rows[0]["dice"]), abs=1e-6)
    # A transform that another program could have written is measured without any network.
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = torch.tensor([-40.0, 8.0])
    write_affine(shift, tmp_path / "other.tfm")
    pair = [word for name in ("moving", "fixed") for word in (f"--{name}", scans / f"{name}.nii.gz")]
    labels = [word for name in ("moving", "fixed") for word in (f"--{name}_label", scans / f"{name}_label.nii.gz")]
    words = ["evaluate", *pair, *labels, "--fixed_to_moving", tmp_path / "other.tfm", "--output", tmp_path / "other"]
    assert run(*words) == 0
    (row,) = rows_of(tmp_path / "other" / "evaluation.csv")
    assert float(row["folding_percent"]) == 0 and "seconds" not in row and 0 <= float(row["dice"]) <= 1


def test_equivariance_is_printed_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_weights(tmp_path / "weights.pt", 2)
    words = ["equivariance", "--weights", tmp_path / "weights.pt", "--pairs", 1, "--shifts", "0,8", "--angles", "90"]
    assert run(*words, "--crop", "--output", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "8 voxels" in told and "90 deg" in told and "Dice" in told
    rows = rows_of(tmp_path / "out" / "equivariance.csv")
    errors = {(row["kind"], row["side"], float(row["amount"])): float(row["error_max"]) for row in rows}
    assert (
        errors["shift", "moving", 8.0] < 1e-3 and errors["shift", "fixed", 8.0] < 1e-3 < errors["angle", "moving", 90.0]
    )
    assert (tmp_path / "out" / "equivariance.png").stat().st_size > 5000
    assert run(*words[:-1], "quarter") == 1 and "quarter" in capsys.readouterr().err


def test_help_teaches_and_is_instant() -> None:
    program = "import sys, equireg.cli as c; c.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    check = program.replace("c.main(sys.argv[1:])", "exec('try: c.main(sys.argv[1:])\\nexcept SystemExit: pass')")
    for words in (["--help"], ["register", "--help"], ["batch", "-h"]):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, env=_plain())
        assert done.returncode == 0, done.stderr
        assert time.perf_counter() - started < 5  # a second on an idle machine
        said = done.stdout + done.stderr
        assert "GROUP" not in said and (words[0] != "batch" or "fixed_points" in said)
        assert all(command in said for command in COMMANDS) if words == ["--help"] else words[0] in said


def _plain() -> dict[str, str]:
    return {**os.environ, "PAGER": "cat", "TERM": "dumb"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    text = COMMANDS[command].__doc__ or ""
    names = COMMANDS[command].__kwdefaults__ or {}
    assert all(f"        {name}: " in text for name in names) and "Example:" in text


def test_the_example_commands_name_options_that_exist() -> None:
    import re
    import shlex

    from equireg import cli

    for command in COMMANDS.values():
        example = re.search(r"Example:\n(.*)", command.__doc__ or "", re.DOTALL).group(1).replace("\\\n", " ")
        assert cli._normalized(shlex.split(" ".join(example.split()))[1:])[0] == command.__name__


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["register", "--moving", "a.nii.gz"], 2, "--fixed, --output missing"),
        (["register", "--movign", "a.nii.gz"], 2, "did you mean --moving"),
        (["register", "a.nii.gz", "b.nii.gz"], 2, "--name value"),
        (["register", "--moving"], 2, "--moving needs a value"),
        (["batch", "--pairs", "a.csv", "--output", "b", "--moving_label", "c"], 2, "no option --moving_label"),
        (["warp", "--transform", "a.h5", "--output", "b.nii.gz"], 1, "--image with a --reference, or --points"),
        (["evaluate", "--output", "b"], 1, "--pairs"),
        (["batch", "--pairs", "none.csv", "--output", "b"], 1, "none.csv"),
        (["register", "-x", "a"], 2, "no option -x"),
        (["warp", "--transform", "", "--output", "b.nii.gz"], 2, "--transform needs a value"),
        (["regsiter", "--moving", "a"], 2, "did you mean register?"),
        (["align"], 2, "choose one of register"),
        (["batch", "--pairs", "a.csv", "--output", "b", "--spacing", "wide"], 1, "--spacing is a number"),
        (["evaluate", "--moving", "a.nii.gz", "--output", "b"], 1, "both --moving and --fixed"),
        (["register", "-m", "a"], 2, "no option -m"),  # of several that begin so
    ],
)
def test_commands_that_make_no_sense(
    words: Sequence[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == code
    told = capsys.readouterr().err
    assert message in told and told.startswith("equireg") and len(told.strip().splitlines()) == 1


def bad_image(folder: Path, kind: str) -> Path:
    """Write an image that is wrong in some way."""
    path = folder / "bad.nii.gz"
    values, affine = blob((30, 28), (14, 13), 9), np.eye(4)
    if kind == "missing":
        return path
    if kind in ("empty", "garbage", "truncated"):
        nib.save(nib.Nifti1Image(values, affine), path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "garbage": b"what is this" * 50, "truncated": whole[: len(whole) // 2]}[kind])
        return path
    if kind == "nan":
        values[10, 10] = np.nan
    if kind == "constant":
        values[:] = 7.0
    if kind == "3D":
        values = np.stack([values] * 5, axis=2)
    if kind == "4D":
        values = np.stack([np.stack([values] * 5, axis=2)] * 3, axis=3)
    if kind == "singular":
        affine[:2, 0] = affine[:2, 1] = (1.0, 1.0)
    if kind == "sheared":
        affine[0, 1] = 0.5
    image = nib.Nifti1Image(values, affine)
    if kind == "zero spacing":
        image.header["pixdim"][1] = 0
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    nib.save(image, path)
    return path


KINDS = [
    "missing",
    "empty",
    "garbage",
    "truncated",
    "nan",
    "constant",
    "3D",
    "4D",
    "singular",
    "sheared",
    "zero spacing",
]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_end_in_one_sentence_and_leave_nothing(
    kind: str, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_image(tmp_path, kind)
    words = ["register", "--moving", path, "--fixed", scans / "fixed.nii.gz", "--output", tmp_path / "out"]
    assert run(*words, "--weights", scans / "weights.pt") == 1
    told = capsys.readouterr().err
    assert told.startswith("equireg: ") and "bad.nii.gz" in told and len(told.strip().splitlines()) == 1, told
    assert not (tmp_path / "out").exists()


def test_other_bad_input(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "outside.csv").write_text("x,y\n1,2\n4000,5\n")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    cases = [
        (["--output", tmp_path / "file"], "file"),
        (["--output", tmp_path / "file" / "deeper"], "file"),
        (["--moving_label", scans / "fixed_label.nii.gz"], "fixed_label.nii.gz"),  # on another grid
        (["--moving_label", scans / "moving.nii.gz"], "moving.nii.gz"),  # an image, no label map
        (["--moving_points", tmp_path / "outside.csv"], "outside.csv"),
        (["--moving_points", scans / "moving.nii.gz"], "moving.nii.gz"),
        (["--initial_transform", scans / "moving.csv"], "moving.csv"),
        (["--weights", "hippocampus"], "3D"),
        (["--weights", tmp_path / "other.pt"], "other.pt"),
        (["--weights", scans / "fixed.nii.gz"], "fixed.nii.gz"),
        (["--weights", "nothing"], "nothing"),
        (["--exports", "h6"], "h6"),
    ]
    for more, message in cases:
        words = register_words(scans, tmp_path / "out")
        if "--output" in more:
            words = [word for word in words if word not in ("--output", tmp_path / "out")]
        if "--weights" in more:
            words = [word for word in words if word not in ("--weights", scans / "weights.pt")]
        assert run(*words, *more) == 1, more
        told = capsys.readouterr().err
        assert told.startswith("equireg: ") and message in told and len(told.strip().splitlines()) == 1, told
    assert (tmp_path / "file").read_text() == "in the way" and not list(tmp_path.glob("out/*"))


def test_inputs_are_never_written_over(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, points = tmp_path / "out", tmp_path / "points.csv"
    copies = {name: tmp_path / f"{name}.nii.gz" for name in ("moving", "fixed")}
    for name, path in copies.items():
        path.write_bytes((scans / f"{name}.nii.gz").read_bytes())
    points.write_bytes((scans / "moving.csv").read_bytes())
    assert run(*register_words(scans, out, "--moving_points", scans / "moving.csv", "--exports", "affine")) == 0
    field, affine = out / "fixed_to_moving.nii.gz", out / "affine.tfm"
    commands = [
        register_words(scans, out, "--moving_points", out / "moved_points.csv"),
        register_words(scans, out, "--initial_transform", affine, "--exports", "affine"),
        [
            "warp",
            "--image",
            copies["moving"],
            "--transform",
            field,
            "--reference",
            copies["fixed"],
            "--output",
            copies["moving"],
        ],
        [
            "warp",
            "--image",
            copies["moving"],
            "--transform",
            field,
            "--reference",
            copies["fixed"],
            "--output",
            copies["fixed"],
        ],
        ["warp", "--points", points, "--transform", field, "--output", points],
        ["compose", "--transforms", field, "--reference", copies["fixed"], "--output", field],
        ["invert", "--transform", field, "--reference", copies["moving"], "--output", field],
        ["invert", "--transform", affine, "--output", affine],
    ]
    before = {path: path.read_bytes() for path in [*out.iterdir(), *copies.values(), points]}
    capsys.readouterr()
    for words in commands:
        assert run(*words) == 1, words
        told = capsys.readouterr().err
        assert "take the place of an input" in told or "outside the image" in told  # moved points lie elsewhere
        assert before == {path: path.read_bytes() for path in [*out.iterdir(), *copies.values(), points]}


def test_results_of_another_registration_do_not_stay(scans: Path, tmp_path: Path) -> None:
    label = ["--moving_label", scans / "moving_label.nii.gz", "--exports", "affine"]
    assert run(*register_words(scans, tmp_path / "out", *label)) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(*register_words(scans, tmp_path / "out", "--nopicture")) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"moved.nii.gz", "fixed_to_moving.nii.gz", "moving_to_fixed.nii.gz", "report.json", "notes.txt"}
    assert names == expected


def test_a_full_disk_leaves_nothing(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    assert run(*register_words(scans, tmp_path / "out")) == 1
    told = capsys.readouterr().err
    assert "No space left" in told and len(told.strip().splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_files_with_names_like_numbers_stay_files(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*register_words(scans, Path("2024"), "--nopicture")) == 0
    assert (tmp_path / "2024" / "report.json").exists()
    assert equireg.__version__ in (tmp_path / "2024" / "report.json").read_text()


def test_inverse_on_disk_is_the_inverse(scans: Path, tmp_path: Path) -> None:
    assert run(*register_words(scans, tmp_path / "out", "--nopicture")) == 0
    (there,), (back,) = (
        read_transform(tmp_path / "out" / f"{n}.nii.gz") for n in ("fixed_to_moving", "moving_to_fixed")
    )
    again = invert_field(there, back.affine, back.shape[1:])
    assert (again - back).abs().max() < 0.02
    assert sample_transform([there], there.affine, there.shape[1:]).shape == there.shape
