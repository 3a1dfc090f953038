"""The bundle as it is handed out: what the model zoo asks of it, and the zip at work where nothing else is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundle import TINY_2D, TINY_TRAINING, blob, files, inside_bundle, random_weights, run, save_image, told

from equireg.registration import register

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file", "ignore:No hash value provided")
LARGE = 25 * 2**20  # bytes above which the zoo wants a file listed in large_files, and not in the bundle
ALONE = "import runpy, sys; sys.modules['equireg'] = None; {code}"  # the installed package cannot be imported


@pytest.fixture(scope="module")
def archive(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the zip by the Makefile's command, elsewhere than in `dist`."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("needs git and the repository")
    path = tmp_path_factory.mktemp("dist") / "equireg.zip"
    recipe = (root / "Makefile").read_text().split("\nrelease:", 1)[1]
    [line] = [line.strip().lstrip("@") for line in recipe.splitlines() if "git archive" in line][:1]
    subprocess.run(line.replace("dist/equireg.zip", str(path)), shell=True, cwd=root, check=True)
    return path


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let MONAI unpack the zip from a folder in which it lies, as it would after a download; return that folder."""
    folder = tmp_path_factory.mktemp("empty")
    shutil.copy(archive, folder)
    monai.bundle.download("equireg", bundle_dir=str(folder), url="https://example.invalid/equireg.zip")
    return folder


def alone(code: str, cwd: Path, *words: Any) -> str:
    """Run code in a process that knows the bundle's folder alone, and return what it prints last."""
    command = [sys.executable, "-c", ALONE.format(code=code), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


# ---- files and metadata


def test_the_zip_holds_one_folder_and_what_the_zoo_asks_for(archive: Path) -> None:
    entries = {entry.filename: entry.file_size for entry in zipfile.ZipFile(archive).infolist() if not entry.is_dir()}
    assert {name.split("/")[0] for name in entries} == {"equireg"}
    needed = [
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/train.json",
        "configs/evaluate.json",
    ]
    needed += ["configs/logging.conf", "models/model.pt", "docs/README.md", "docs/data_license.txt"]
    assert not {f"equireg/{name}" for name in needed} - set(entries)
    assert max(entries.values()) < LARGE
    assert not [name for name in entries if "__pycache__" in name or name.endswith((".pyc", ".log", ".ts", ".onnx"))]


def test_metadata_has_what_the_zoo_adds_to_the_specification(root: Path) -> None:
    metadata = json.loads((root / "bundle" / "configs" / "metadata.json").read_text())
    needed = {"schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "supported_apps"}
    needed |= {"required_packages_version", "name", "task", "description", "authors", "copyright", "intended_use"}
    needed |= {"data_source", "data_type", "image_classes", "label_classes", "pred_classes", "eval_metrics"}
    needed |= {"references", "network_data_format"}
    assert not needed - set(metadata)
    assert metadata["name"] == "equireg" and list(metadata["changelog"])[0] == metadata["version"]
    keys = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"}
    formats = metadata["network_data_format"]
    assert "modality" in formats["inputs"]["image"]
    for entry in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert not keys - set(entry) and len(entry["channel_def"]) == entry["num_channels"]


# ---- the zip at work


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    far = np.diag([1.0, 1.0, 1.2, 1.0])
    far[:3, 3] = (90, -40, 10)
    moving = save_image(folder / "moving.nii.gz", blob((26, 24, 22), (12, 12, 11), 9, seed=1), far)
    return moving, save_image(folder / "fixed.nii.gz", blob((24, 27, 22), (12, 14, 11), 8, seed=2))


def test_inference_from_an_empty_folder(unpacked: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the installed package, with the weights of the zip: the same moved image as the package's own."""
    words = ["run", "--config_file", "configs/inference.json", "--output_dir", tmp_path, "--progress", "False"]
    words += ["--moving", pair[0], "--fixed", pair[1]]
    alone("runpy.run_module('monai.bundle', run_name='__main__')", unpacked / "equireg", *words)
    moved = nib.load(tmp_path / "moving_to_fixed_moved.nii.gz")
    expected = register(*pair, weights="brain").moved
    assert np.array_equal(moved.affine, nib.load(pair[1]).affine) and moved.get_data_dtype() == np.float32
    assert np.abs(moved.get_fdata() - expected[0].numpy()).max() < 1e-3 * 120


def test_workflows_of_the_zip_have_all_properties_and_load_gives_its_weights(unpacked: Path) -> None:
    code = (
        "import monai.bundle, torch; sys.path.insert(0, 'equireg');"
        "flows = [monai.bundle.create_workflow(config_file=f'equireg/configs/{name}.json', workflow_type=kind, "
        "logging_file=False, bundle_root='equireg') for name, kind in (('train', 'train'), ('inference', 'infer'))];"
        "[flow.initialize() for flow in flows];"
        "net = monai.bundle.load('equireg', bundle_dir='.', device='cpu');"
        "own, file = net.state_dict(), torch.load('equireg/models/model.pt', weights_only=True);"
        "print([flow.check_properties() for flow in flows], type(net).__module__, own.keys() == file.keys(), "
        "all(torch.equal(own[key], value.to(own[key])) for key, value in file.items()))"
    )
    assert alone(code, unpacked) == "[[], []] scripts.networks.pair True True"


# ---- weights that do not fit


@pytest.fixture
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


def lacking(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in state if name.endswith("weight"))
    return {key: value for key, value in state.items() if key != name}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def resized(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in state if name.endswith("weight"))
    return {**state, name: state[name][:1]}


def additional(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "net.head.weight": torch.zeros(1)}


CONFIGS = {
    "inference": ("run", ["inference"], "weights"),
    "evaluation": ("run", ["train", "evaluate"], "weights"),
    "fine-tuning": ("training", ["train"], "pretrained"),
}


@pytest.mark.parametrize("damage", [lacking, renamed, resized, additional], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("job", CONFIGS)
def test_weights_that_do_not_fit_are_an_error(
    job: str, damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], bundle: Path, tmp_path: Path
) -> None:
    run_id, names, key = CONFIGS[job]
    path = random_weights(tmp_path / "w.pt", 2)
    torch.save(damage(torch.load(path, weights_only=True)), path)
    options: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "progress": False, key: str(path)}
    if job == "inference":
        for name in ("moving", "fixed"):
            options[name] = str(save_image(tmp_path / f"{name}.nii.gz", blob((24, 26), (12, 12), 8)))
    else:
        options |= {**TINY_2D, **TINY_TRAINING, "shape": [32, 32]}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run(run_id, *names, **options)
    # Of a file in which no name is right inference cannot even know the network.
    nameless = job == "inference" and damage is renamed
    assert ("which network it belongs to" if nameless else "do not fit the network") in told(caught.value)
    assert str(path) in told(caught.value)
    assert not list(tmp_path.glob("out/*.pt")) and not list(tmp_path.glob("out/*.nii.gz"))


@pytest.mark.parametrize("damage", [lacking, renamed, resized], ids=lambda damage: damage.__name__)
def test_weights_that_do_not_fit_are_not_exported(damage: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    path = random_weights(tmp_path / "w.pt", 3)
    torch.save(damage(torch.load(path, weights_only=True)), path)
    fitting = random_weights(tmp_path / "fitting.pt", 3)
    with pytest.raises(RuntimeError, match="Missing key|size mismatch"):
        monai.bundle.ckpt_export(
            "network_def",
            filepath=str(tmp_path / "model.ts"),
            ckpt_file=str(path),
            meta_file="configs/metadata.json",
            config_file=files("inference"),
            weights=str(fitting),
        )
    assert not (tmp_path / "model.ts").exists()
