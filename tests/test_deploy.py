"""MONAI Deploy runs our application and the stock operator; run by `make deploy`, where the SDK is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_grids import centered, grid
from monai.data import MetaTensor
from test_registration import anatomy, files

from equireg.images import read_image, write_image

pytest.importorskip("monai.deploy.core", reason="needs the MONAI Deploy App SDK: make deploy")
sitk = pytest.importorskip("SimpleITK")
SERIES = ["--_meta_::network_data_format::outputs::pred::type", "series"]


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that exports the shipped weights as the page says."""
    folder = tmp_path_factory.mktemp("models")

    def export(name: str, *options: str) -> Path:
        path = folder / name
        command = ["ckpt_export", "--net_id", "network_def", "--filepath", str(path), "--ckpt_file", "models/model.pt"]
        command += ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json", *options]
        if not path.exists():
            subprocess.run([sys.executable, "-m", "monai.bundle", *command], cwd=root / "bundle", check=True)
        return path

    return export


def python(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python as a process, one thread in each, so that sums come out the same bit by bit."""
    path = os.pathsep.join([str(root / "bundle"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def run_app(root: Path, app: str, given: Path, out: Path, model: Path) -> subprocess.CompletedProcess[str]:
    return python(root, root / "bundle" / "docs" / "hosts" / "deploy" / app, "-i", given, "-o", out, "-m", model)


# What the application should make of a pair: what the package makes of it with the network inside of the same export.
REGISTER = """
import sys, torch
from equireg.registration import Registrar
from equireg.results import save_registration
model, moving, fixed, out = sys.argv[1:]
save_registration(Registrar(torch.jit.load(model).net, spacing=2.0)(moving, fixed), out)
"""


def register(root: Path, model: Path, moving: Path, fixed: Path, out: Path) -> Path:
    """Register with an exported network, as `app.yaml` says; return the folder of the results."""
    done = python(root, "-c", REGISTER, model, moving, fixed, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pair(model, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a pair on oblique grids; return its folder, and the one of what the package makes of it."""
    given = tmp_path_factory.mktemp("in")
    return given, register(root, model("model.ts"), *files(given, 3), tmp_path_factory.mktemp("reference"))


def same_file(path: Path, expected: Path) -> None:
    """Assert that two NIfTI files hold the same float32 values on the same grid, bit by bit."""
    one, other = nib.load(path), nib.load(expected)
    assert one.get_data_dtype() == other.get_data_dtype() == np.float32
    assert np.array_equal(one.affine, other.affine) and one.header.get_intent() == other.header.get_intent()
    assert np.array_equal(one.get_fdata(dtype=np.float32), other.get_fdata(dtype=np.float32))
    assert np.abs(one.get_fdata()).max() > 0.5


def test_the_application_makes_what_the_package_makes(
    model, pair: tuple[Path, Path], root: Path, tmp_path: Path
) -> None:
    given, reference = pair
    exported = model("model.ts")
    done = run_app(root, "app.py", given, tmp_path / "out", exported)
    assert done.returncode == 0, done.stderr
    for name in ("moved", "fixed_to_moving", "moving_to_fixed"):
        same_file(tmp_path / "out" / f"{name}.nii.gz", reference / f"{name}.nii.gz")
    assert np.allclose(nib.load(tmp_path / "out" / "moved.nii.gz").affine, nib.load(given / "fixed.nii.gz").affine)
    report, expected = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", reference))
    assert report["options"]["weights"] == str(exported) and len(report["options"]["weights_sha256"]) == 64
    for what in ("inputs", "similarity", "folding_percent", "network_inverse_consistency_mm", "best_affine"):
        assert report[what] == expected[what]


def test_the_command_comes_close(model, root: Path, tmp_path: Path) -> None:
    """It runs the network itself, which sums attention up in another order than an export.

    One anatomy on two grids: between random textures, which show nothing that has a partner, the affine map that is
    found multiplies rounding, and both ways end as far from float64 as from each other. The field is inverted until a
    point misses by less than a thousandth of its voxels: where a miss lies at that bound, one of the two takes a step
    more, which moves the point, or those around it that start from there, by a few thousandths.
    """
    given = {}
    for n, (name, values) in enumerate({"moving": anatomy(), "fixed": anatomy()[2:, 4:]}.items()):
        affine = centered(grid(3, 3 + n, (2, 2, 2), angle=20), values.shape, [12.0 * n - 30] * 3)
        image = MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine))
        given[name] = write_image(image, tmp_path / f"{name}.nii.gz")
    reference = register(root, model("model.ts"), given["moving"], given["fixed"], tmp_path / "reference")
    words = ["--moving", given["moving"], "--fixed", given["fixed"], "--spacing", 2.0]
    done = python(root, "-m", "equireg", "register", *words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found, expected = (
        {
            name: nib.load(folder / f"{name}.nii.gz").get_fdata()
            for name in ("moved", "fixed_to_moving", "moving_to_fixed")
        }
        for folder in (tmp_path / "out", reference)
    )
    off, scale = (
        {name: np.linalg.norm(field, axis=-1) for name, field in fields.items() if name != "moved"}
        for fields in ({name: found[name] - expected[name] for name in found}, expected)
    )
    # 2e-6 of the largest was measured, after 19 rounds in float32.
    assert off["fixed_to_moving"].max() < 1e-5 * scale["fixed_to_moving"].max()
    assert np.quantile(off["moving_to_fixed"], 0.99) < 1e-5 * scale["moving_to_fixed"].max()
    assert off["moving_to_fixed"].max() < 4e-3 * 2.0  # millimeters
    # Voxel values change by no more than the steepest slopes of the image make of the field's change, plus float32 of
    # their size. Beyond the grid there is 0.
    moving = nib.load(given["moving"])
    values, spacing = np.pad(moving.get_fdata(), 1), moving.header.get_zooms()
    steepest = np.linalg.norm([np.abs(np.diff(values, axis=axis)).max() / spacing[axis] for axis in range(3)])
    bound = steepest * off["fixed_to_moving"].max() + 1e-6 * values.max()
    assert np.abs(found["moved"] - expected["moved"]).max() < bound and expected["moved"].max() > 0.5


def test_the_stock_operator_makes_the_same(model, pair: tuple[Path, Path], root: Path, tmp_path: Path) -> None:
    given, reference = pair
    done = run_app(root, "stock_app.py", given, tmp_path / "out", model("model_series.ts", *SERIES))
    assert done.returncode == 0, done.stderr
    for name in ("moved", "fixed_to_moving"):
        same_file(tmp_path / "out" / f"{name}.nii.gz", reference / f"{name}.nii.gz")


def test_the_stock_operator_needs_another_type_in_the_metadata(
    model, pair: tuple[Path, Path], root: Path, tmp_path: Path
) -> None:
    """Type "image" asks the operator for one channel of uint8: no displacement field passes."""
    done = run_app(root, "stock_app.py", pair[0], tmp_path / "out", model("model.ts"))
    assert done.returncode != 0 and "cannot select an axis to squeeze out" in done.stderr


def test_a_missing_image_fails_with_its_name(model, root: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files(tmp_path / "in", 3)
    (tmp_path / "in" / "fixed.nii.gz").unlink()
    done = run_app(root, "app.py", tmp_path / "in", tmp_path / "out", model("model.ts"))
    assert done.returncode != 0 and "expected one file or DICOM folder 'fixed*'" in done.stderr


def write_series(
    folder: Path, values: np.ndarray, origin: tuple[float, float, float], pixel: tuple[float, float] = (0.7, 0.9)
) -> Path:
    """Write an array (x, y, slice) as a series of CT slices 2 mm apart, LPS."""
    folder.mkdir()
    for number in range(values.shape[2]):
        slice_ = sitk.GetImageFromArray(np.round(values[:, :, number].T).astype(np.int16)[None])
        slice_.SetSpacing((*pixel, 2.0))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0018": f"1.2.3.{number}"}
        tags |= {"0020|0032": f"{origin[0]}\\{origin[1]}\\{origin[2] + 2 * number}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        tags |= {"0020|0011": "1", "0020|0013": str(number + 1), "0028|1052": "0", "0028|1053": "1"}
        for key, value in tags.items():
            slice_.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(slice_)
    return folder


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Make a folder with a moving and a fixed DICOM series, the fixed one smaller and elsewhere."""
    values = anatomy((40, 52, 20))
    (tmp_path / "in").mkdir()
    write_series(tmp_path / "in" / "moving", values, (-10, 20, 5))
    write_series(tmp_path / "in" / "fixed", values[2:, 4:], (30, -15, 60))
    return tmp_path / "in"


def test_dicom_series(model, series: Path, root: Path, tmp_path: Path) -> None:
    exported = model("model.ts")
    done = run_app(root, "app.py", series, tmp_path / "out", exported)
    assert done.returncode == 0, done.stderr
    register(root, exported, series / "moving", series / "fixed", tmp_path / "reference")
    for name in ("moved", "fixed_to_moving", "moving_to_fixed"):
        same_file(tmp_path / "out" / f"{name}.nii.gz", tmp_path / "reference" / f"{name}.nii.gz")


@pytest.fixture
def operators(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "hosts" / "deploy"))
    return pytest.importorskip("operators")


def sdk_image(folder: Path):
    """Read a series as the SDK's own DICOM operators do."""
    from monai.deploy.core import Application
    from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
    from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
    from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator

    app = Application()
    studies = DICOMDataLoaderOperator(app, name="loader").load_data_to_studies(folder)
    selected = DICOMSeriesSelectorOperator(app, rules="", name="selector").filter(None, studies)
    return DICOMSeriesToVolumeOperator(app, name="volume").convert_to_image(selected)


def test_images_of_the_sdk_lie_where_their_files_do(operators: ModuleType, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", anatomy((40, 52, 20)), (-10, 20, 5), pixel=(0.8, 0.8))
    theirs, ours = (read_image(source) for source in (operators.readable(sdk_image(folder)), folder))
    one, other = (nib.as_closest_canonical(nib.Nifti1Image(i[0].numpy(), i.affine.numpy())) for i in (theirs, ours))
    assert np.allclose(one.affine, other.affine, atol=1e-4)
    assert np.array_equal(one.get_fdata(), other.get_fdata()) and one.get_fdata().max() > 40


def test_images_that_the_sdk_places_wrongly_are_refused(operators: ModuleType, series: Path) -> None:
    image = sdk_image(series / "moving")
    wrong = np.linalg.norm(image.metadata()["nifti_affine_transform"][:3, :2], axis=0)
    assert np.allclose(wrong, (0.9, 0.7)), "if the SDK places it rightly now, the refusal can go"
    with pytest.raises(ValueError, match="pixels that are not square, got 0.9 x 0.7 mm: pass the folder"):
        operators.readable(image)


def test_a_path_is_read_as_it_is(operators: ModuleType, tmp_path: Path) -> None:
    assert operators.readable(tmp_path) is tmp_path
    affine = grid(3, 0)
    assert operators.readable((1, affine))[1] is affine
