"""Trainings on labels: of labeled images, and of images painted from label maps alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_bundle import TINY_TRAINING, blob, inside_bundle, run, save_image

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")
SMALL = {**TINY_TRAINING, "val_pairs": 1, "iterations": 1}


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_labels_take_part_in_training(weight: float, tmp_path: Path) -> None:
    """The embedded images have labels; what they weigh decides what is learned."""
    options = {**SMALL, "num_labels": 20, "shape": [16, 16, 16], "spatial_dims": 3}
    run("training", "train", "labels", **options, label_weight=weight, output_dir=str(tmp_path / "labels"))
    run("training", "train", **options, regularity_weight=0.5, output_dir=str(tmp_path / "images"))
    with_labels, without = learned(tmp_path / "labels"), learned(tmp_path / "images")
    same = all(torch.equal(with_labels[name], without[name]) for name in without if "weight" in name)
    assert same == (weight == 0.0)


@pytest.fixture
def label_maps(tmp_path: Path) -> Path:
    """Write ten maps of a ball in a shell of fluid, with a skull around them, in SynthSeg's labels."""
    (tmp_path / "maps").mkdir()
    for number in range(10):
        labels = np.zeros((24, 26, 24), np.int16)
        for label, radius in ((515, 10), (24, 9), (3, 8), (2, 6), (17, 3)):
            labels[blob(labels.shape, (12, 13 + number % 2, 12), radius) > 0] = label
        labels[:12][labels[:12] == 2] = 41
        save_image(tmp_path / "maps" / f"training_seg_{number:02}.nii.gz", labels, np.diag([2.0, 2.0, 2.0, 1.0]))
    return tmp_path / "maps"


@pytest.mark.parametrize("stage", [["brain"], ["brain", "brain_coarse"]])
def test_brains_are_learned_from_label_maps(stage: list[str], label_maps: Path, tmp_path: Path) -> None:
    options = {**SMALL, "dataset_dir": str(label_maps), "shape": [24, 24, 24], "val_pairs": 2}
    if "brain_coarse" in stage:
        options = {k: v for k, v in options.items() if not k.startswith("network_def")}
    run("training", "train", *stage, **options, output_dir=str(tmp_path / "out"))
    assert all(torch.isfinite(value).all() for value in learned(tmp_path / "out").values())
