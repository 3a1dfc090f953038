"""MONAI Label serves the bundle, and our own app; run by `make label`, in an environment that has MONAI Label."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundle import decathlon_folder, save_image
from test_bundle import check_field, oblique, stored_as
from test_registration import anatomy

import equireg

pytest.importorskip("monailabel", reason="needs MONAI Label: make label")
from fastapi import HTTPException  # after the skip
from monailabel.client.client import MONAILabelClient, MONAILabelClientException
from monailabel.interfaces.app import MONAILabelApp

START, TRAIN = 120, 300  # seconds after which a server, or a training, is taken for hanging


class Served:
    """A running server of MONAI Label with its own datastore, as its Python client and 3D Slicer's panel see it."""

    def __init__(self, app: str, folder: Path, root: Path) -> None:
        self.studies, self.app, self.log = folder / "studies", folder / "work" / app, folder / "server.log"
        self.studies.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = root / "bundle" / "docs" / "hosts" / "label.sh"
        command = ["bash", str(script), app, str(self.studies), str(port), str(folder / "work")]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PATH": path})
        self.client = MONAILabelClient(f"http://127.0.0.1:{port}", str(folder))
        self.wait(self.answers, START)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(self.client.info())
        except OSError:
            return False

    def wait(self, done: Callable[[], Any], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.log.read_text()[-5000:]
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def bundle_server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return the unmodified app `monaibundle` with a copy of the bundle."""
    served = Served("monaibundle", tmp_path_factory.mktemp("monaibundle"), root)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def own_server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return our own app."""
    served = Served("label_app", tmp_path_factory.mktemp("label_app"), root)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one organ as large as a brain twice, one stretched and 40 mm away, on oblique grids of different orders."""
    folder = tmp_path_factory.mktemp("images")
    organ, label = anatomy(), (anatomy() > 120).astype(np.float32)
    canvas = tuple(slice(a, a + n) for a, n in zip((6, 3, 2), organ.shape))
    for name, values in (("", organ), ("_label", label)):
        larger = np.zeros((50, 60, 44), np.float32)
        larger[canvas] = values
        save_image(folder / f"moving{name}.nii.gz", larger, oblique((3, 3.24, 3), 0.4, (30, -10, 5)))
        fixed = nib.Nifti1Image(values, oblique((3, 3, 3), 0.4, (-5, 15, 12)))
        nib.save(stored_as(fixed, "LPS"), folder / f"fixed{name}.nii.gz")
    return folder


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def check_moved(folder: Path, moved: str) -> None:
    """Assert that an answer lies on the fixed grid and shows what the fixed image shows."""
    found, fixed = nib.load(moved), nib.load(folder / "fixed.nii.gz")
    assert found.shape == fixed.shape and found.get_data_dtype() == np.float32
    assert np.allclose(found.affine, fixed.affine, atol=1e-4)
    values, expected = found.get_fdata(), fixed.get_fdata()
    assert np.abs(values - expected).mean() < 0.1 * expected.mean()


def test_the_stock_app_registers_two_images(bundle_server: Served, images: Path) -> None:
    """The fixed image by its id, the moving one by the name of a file beside it; `--optimize` by request."""
    for name in ("moving", "fixed"):
        assert bundle_server.client.upload_image(str(images / f"{name}.nii.gz"), name)["image"] == name
    moved, result = bundle_server.client.infer("equireg", "fixed", {"moving": "moving.nii.gz"})
    check_moved(images, moved)
    for name in ("fixed_to_moving", "moving_to_fixed"):
        assert Path(result["files"][name]).is_file()
    check_field(images, "moving", Path(moved), Path(result["files"]["fixed_to_moving"]), 3)
    assert result["similarity"]["before"] < 0.2 and result["similarity"]["after"] > 0.9
    assert result["folding_percent"] < 1 and result["warnings"] == []
    _, optimized = bundle_server.client.infer("equireg", "fixed", {"moving": "moving.nii.gz", "optimize": 20})
    # The images differ by an affine map, whose log J is the same everywhere: what optimization brings is smoothness.
    assert optimized["sd_log_jacobian"] < result["sd_log_jacobian"] and optimized["similarity"]["after"] > 0.9


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "a pair needs a fixed image 'image' and a moving image 'moving', got"),
        ({"moving": "none.nii.gz"}, "none.nii.gz' does not exist"),
        ({"moving": "moving.nii.gz", "model_filename": "vessels.pt"}, "the weights belong to another network"),
    ],
)
def test_the_stock_app_logs_what_is_wrong(
    params: dict[str, str], message: str, bundle_server: Served, images: Path
) -> None:
    """The client sees status 500 and no more: MONAI Label keeps errors of transforms in its log."""
    for name in ("moving", "fixed"):
        shutil.copy(images / f"{name}.nii.gz", bundle_server.studies)
    with pytest.raises(MONAILabelClientException) as caught:
        bundle_server.client.infer("equireg", str(bundle_server.studies / "fixed.nii.gz"), params)
    assert "Status: 500" in caught.value.msg
    bundle_server.wait(lambda: message in bundle_server.log.read_text(), 10)  # written after the answer


def trained(served: Served, **params: Any) -> dict[str, Any]:
    """Train to the end and return what the server says of it."""
    served.client.train_start("equireg", {"max_epochs": 1, "val_split": 0.5, "device": "cpu", **params})
    served.wait(lambda: served.client.train_status()["status"] not in ("SUBMITTED", "RUNNING"), TRAIN)
    return served.client.train_status()


def test_the_stock_app_trains_from_its_datastore(bundle_server: Served, tmp_path: Path) -> None:
    """First with nothing labeled, which is an error; then with four labeled subjects, from the shipped weights."""
    bundle = bundle_server.app / "model" / "equireg"
    config = bundle / "configs" / "train.json"
    config.write_text(config.read_text().replace('"iterations": 100', '"iterations": 2'))
    empty = trained(bundle_server)
    assert empty["status"] == "ERROR"
    assert "at least two subjects to make a pair, got 0" in bundle_server.log.read_text()
    folder = decathlon_folder(tmp_path / "Task", count=4)
    for image in sorted((folder / "imagesTr").iterdir()):
        name = image.name.removesuffix(".nii.gz")
        bundle_server.client.upload_image(str(image), name)
        bundle_server.client.save_label(name, str(folder / "labelsTr" / image.name))
    assert trained(bundle_server)["status"] == "DONE", bundle_server.log.read_text()[-5000:]
    done = torch.load(bundle / "output" / "checkpoint.pt", weights_only=True)
    assert done["trainer"]["iteration"] == 2
    shipped = torch.load(bundle / "models" / "model.pt", weights_only=True)
    state = torch.load(bundle / "output" / "model.pt", weights_only=True)
    assert state.keys() == shipped.keys()
    moves = [(state[name].float() - shipped[name].float()).abs().max() for name in state if "weight" in name]
    assert 0 < max(moves) < 0.01  # two steps of 0.0003 away from the shipped weights, not from random ones


def test_our_app_registers_by_ids(own_server: Served, images: Path) -> None:
    for name in ("moving", "fixed"):
        own_server.client.upload_image(str(images / f"{name}.nii.gz"), name)
    models = own_server.client.info()["models"]
    assert models["register"]["type"] == "others" and set(models["register"]["config"]["moving"]) >= {"moving", "fixed"}
    moved, result = own_server.client.infer("register", "fixed", {"moving": "moving", "exports": ["h5"]})
    check_moved(images, moved)
    check_field(images, "moving", Path(moved), Path(result["files"]["fixed_to_moving"]), 3)
    assert Path(result["files"]["fixed_to_moving_h5"]).is_file() and Path(result["files"]["report"]).is_file()
    assert result["similarity"]["after"] > 0.9 and result["warnings"] == []
    field, _ = own_server.client.infer("register", "fixed", {"moving": "moving", "answer": "fixed_to_moving"})
    assert np.array_equal(nib.load(field).get_fdata(), nib.load(result["files"]["fixed_to_moving"]).get_fdata())


@pytest.mark.parametrize(
    ("model", "fixed", "params", "message"),
    [
        ("register", "fixed", {}, "the datastore has no image '': choose the moving image by its id"),
        ("register", "fixed", {"moving": "none"}, "no image 'none': choose the moving image"),
        ("register", "none", {"moving": "moving"}, "no image 'none': choose the fixed image"),
        ("register", "fixed", {"moving": "moving", "optimize": -1}, "optimize is a number of steps"),
        ("register", "fixed", {"moving": "moving", "weights": "none"}, "no weights 'none'"),
        ("register", "fixed", {"moving": "moving", "answer": "ddf"}, "the answer is one of moved, "),
        ("register", "fixed", {"moving": "moving", "exports": 5}, "exports are a list of any of h5, "),
        ("none", "fixed", {"moving": "moving"}, "the model is one of register, propagate"),
        ("propagate", "fixed", {"moving": "fixed"}, "the moving image 'fixed' has no final label"),
    ],
)
def test_our_app_says_what_is_wrong(
    model: str, fixed: str, params: dict[str, Any], message: str, own_server: Served, images: Path
) -> None:
    for name in ("moving", "fixed"):
        own_server.client.upload_image(str(images / f"{name}.nii.gz"), name)
    with pytest.raises(MONAILabelClientException) as caught:
        own_server.client.infer(model, fixed, params)
    assert "Status: 400" in caught.value.msg and message in caught.value.msg


@pytest.fixture(scope="module")
def own_app(root: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> MONAILabelApp:
    """Return our own app without a server, with both images in its datastore and the moving one labeled."""
    folder = tmp_path_factory.mktemp("own_app")
    script = root / "bundle" / "docs" / "hosts" / "label_app" / "main.py"
    spec = importlib.util.spec_from_file_location("label_app_main", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "studies").mkdir()
    app = module.EquiregApp(str(folder), str(folder / "studies"), {})
    for name in ("moving", "fixed"):
        app.datastore().add_image(name, str(images / f"{name}.nii.gz"), {})
    segments = ["unnamed", {"name": "no value"}, {"name": "bright cells", "idx": 1}]
    app.datastore().save_label("moving", str(images / "moving_label.nii.gz"), "final", {"label_info": segments})
    return app


def test_requests_for_one_pair_share_no_file(own_app: MONAILabelApp) -> None:
    asked = [{}, {"optimize": 3}, {"optimize": 5, "exports": ["h5"]}, {"answer": "fixed_to_moving"}]
    requests = [{"model": "register", "image": "fixed", "moving": "moving", **options} for options in asked]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(own_app.infer, requests))
    paths = [path for answer in answers for path in (answer["file"], *answer["params"]["files"].values())]
    assert len(set(paths)) == len(paths)
    for options, answer in zip(asked, answers):
        files = {what: Path(path) for what, path in answer["params"]["files"].items()}
        report = json.loads(files["report"].read_text())
        assert report["options"]["optimize"] == answer["params"]["options"]["optimize"] == options.get("optimize", 0)
        assert report["exports"] == options.get("exports", []) and all(path.is_file() for path in files.values())
        assert Path(answer["file"]).read_bytes() == files[options.get("answer", "moved")].read_bytes()
        assert answer["params"]["label_names"] == {"bright cells": 1}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"moving": None}, "the datastore has no image None: choose the moving image by its id"),
        ({"moving": ["moving"]}, r"the datastore has no image \['moving'\]"),
        ({"image": 5}, "the datastore has no image 5: choose the fixed image by its id"),
        ({"model": ["register"]}, r"the model is one of register, propagate, got \['register'\]"),
        ({"answer": ["moved"]}, r"the answer is one of moved, .*, got \['moved'\]"),
        ({"exports": "h5"}, "exports are a list of any of h5, affine, learn2reg, got 'h5'"),
        ({"exports": [["h5"]]}, r"exports are a list of any of h5, .*, got \[\['h5'\]\]"),
        ({"exports": ["h6"]}, "exports are any of h5, .*, got h6"),
        ({"device": None}, "the device 'None' cannot be used here"),
        ({"spacing": ["a", "b", "c"]}, "spacing should be 3 positive numbers"),
        ({"optimize": "50"}, "optimize is a number of steps, 0 or more, got '50'"),
        ({"weights": "vessels"}, "2D"),
        ({"background": None}, "the background is a number, got None"),
    ],
)
def test_a_bad_request_gets_one_sentence(request_: dict[str, Any], message: str, own_app: MONAILabelApp) -> None:
    """Whatever JSON can hold in place of what is expected; nothing is left behind."""
    results = Path(own_app.app_dir) / "results"
    before = set(results.rglob("*"))
    with pytest.raises(HTTPException, match=message) as caught:
        own_app.infer({"model": "register", "image": "fixed", "moving": "moving", **request_})
    assert caught.value.status_code == 400 and "\n" not in caught.value.detail
    assert set(results.rglob("*")) == before


@pytest.mark.parametrize("part", ["register", "save_registration"])
def test_what_fails_unexpectedly_is_no_bad_request(
    part: str, own_app: MONAILabelApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI Label answers such errors with status 500, and logs them."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device") if part == "save_registration" else RuntimeError("a bug")

    if part == "register":
        monkeypatch.setattr(equireg, part, fail)
    else:
        monkeypatch.setitem(type(own_app).infer.__globals__, part, fail)
    with pytest.raises((OSError, RuntimeError), match="No space left|a bug"):
        own_app.infer({"model": "register", "image": "fixed", "moving": "moving"})


def test_our_app_brings_a_label_over(own_server: Served, images: Path) -> None:
    for name in ("moving", "fixed"):
        own_server.client.upload_image(str(images / f"{name}.nii.gz"), f"labeled_{name}")
    segments = {"label_info": [{"name": "bright cells", "idx": 1}]}
    own_server.client.save_label("labeled_moving", str(images / "moving_label.nii.gz"), params=segments)
    moved, result = own_server.client.infer("propagate", "labeled_fixed", {"moving": "labeled_moving"})
    found, expected = nib.load(moved), nib.load(images / "fixed_label.nii.gz")
    assert np.allclose(found.affine, expected.affine, atol=1e-4) and result["label_names"] == {"bright cells": 1}
    assert dice(found.get_fdata() == 1, expected.get_fdata() == 1) > 0.9


def test_two_hippocampi(own_server: Served, shared_data: Path) -> None:
    """Labels that are final come along: the report says how they overlap."""
    folder = shared_data / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    names = [path.name for path in sorted((folder / "imagesTr").glob("hippocampus_*.nii.gz"))[:2]]
    ids = [name.removesuffix(".nii.gz") for name in names]
    for name, image in zip(names, ids):
        own_server.client.upload_image(str(folder / "imagesTr" / name), image)
        own_server.client.save_label(image, str(folder / "labelsTr" / name))
    moved, result = own_server.client.infer(
        "register", ids[1], {"moving": ids[0], "weights": "hippocampus", "optimize": 50}
    )
    fixed = nib.load(folder / "imagesTr" / names[1])
    assert nib.load(moved).shape == fixed.shape and np.allclose(nib.load(moved).affine, fixed.affine, atol=1e-4)
    assert result["overlap"]["dice"] > max(0.6, result["overlap"]["dice_before"])
