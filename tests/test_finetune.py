"""Fine-tuning on a folder of images, and going on after a kill in the middle of an epoch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_bundle import (
    TINY_NETWORK,
    TINY_TRAINING,
    blob,
    files,
    inside_bundle,
    random_weights,
    run,
    save_image,
    told,
)

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Return those of a short training from given weights, on a folder of ten images of 2 mm without labels."""
    for number in range(10):
        path = tmp_path / "images" / f"{number // 2}" / f"scan{number}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, blob((9, 8, 8 + number % 3), (4, 4, 4), 3, seed=number), np.diag([2.0, 2.0, 2.0, 1.0]))
    weights = str(random_weights(tmp_path / "weights.pt", 3))
    options = {key: value for key, value in TINY_TRAINING.items() if key not in TINY_NETWORK}
    return {**options, "dataset_dir": str(tmp_path / "images"), "spacing": 1.0, "pretrained": weights}


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_fine_tuning_starts_from_the_weights_and_keeps_the_best(options: dict[str, Any], tmp_path: Path) -> None:
    pretrained = torch.load(options["pretrained"], weights_only=True)
    for name, rate in (("still", 0.0), ("tuned", 1e-4)):
        run("training", "train", "finetune", **options, output_dir=str(tmp_path / name), learning_rate=rate)
    still, tuned = (checkpoint(tmp_path / name) for name in ("still", "tuned"))
    learned = [name for name in pretrained if pretrained[name].is_floating_point() and "running" not in name]
    assert all(torch.equal(still["model"][name], pretrained[name]) for name in learned)
    assert not any(torch.equal(tuned["model"][name], pretrained[name]) for name in learned if "weight" in name)
    assert -2 < tuned["trainer"]["best"] < 0  # minus a dissimilarity
    assert (tmp_path / "tuned" / "model.pt").exists()


def test_too_few_images_are_told(options: dict[str, Any], tmp_path: Path) -> None:
    for path in sorted((tmp_path / "images").rglob("*.nii.gz"))[5:]:
        path.unlink()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run("training", "train", "finetune", **options, output_dir=str(tmp_path / "out"))
    assert "at least two subjects to make a pair, got 1" in told(caught.value)


def killed_in_epoch(epoch: int, out: Path, options: dict[str, Any]) -> None:
    """Train in a process of its own, and kill it when it has made some steps of an epoch."""
    overrides = [f"--{key}={value}" for key, value in {**options, "output_dir": out, "progress": True}.items()]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file"]
    command += [str(files("train", "finetune")), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = b""
    while not re.search(rf"\[{epoch}/\d+\]: \[3/".encode(), said):
        piece = os.read(process.stderr.fileno(), 65536)
        assert piece, said.decode()
        said += piece
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_kill_in_an_epoch_costs_that_epoch_alone(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"epochs": 3, "iterations": 12}
    killed_in_epoch(2, tmp_path / "killed", options)
    assert checkpoint(tmp_path / "killed")["trainer"]["epoch"] == 1
    run("training", "train", "finetune", **options, output_dir=str(tmp_path / "killed"), resume=True)
    run("training", "train", "finetune", **options, output_dir=str(tmp_path / "whole"))
    for name in ("model.pt", "checkpoint.pt"):
        killed, whole = (torch.load(tmp_path / which / name, weights_only=True) for which in ("killed", "whole"))
        torch.testing.assert_close(killed, whole, rtol=0, atol=0)
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"checkpoint.pt", "model.pt"}
