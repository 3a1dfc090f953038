"""What the tests of the bundle share: running it as MONAI does, tiny settings, and small data sets in folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_networks import randomized
from monai.utils import set_determinism

from equireg.networks import CARL, PairNetwork

TINY_NETWORK = {
    "network_def#net#feature_channels": 8,
    "network_def#net#factor": 4,
    "network_def#net#nesting": "deck",
    "network_def#net#refinement_channels": [4, 8],
    "network_def#net#affine_rounds": 0,
    "network_def#net#affine_turns": "none",
    "network_def#net#flow_rounds": [],
}
TINY_2D = {"spatial_dims": 2, **TINY_NETWORK}
TINY_TRAINING = {"epochs": 1, "iterations": 2, "val_pairs": 2, "progress": False, "tensorboard": False, **TINY_NETWORK}
SIZES = {2: {"spatial_dims": 2, "shape": [32, 32]}, 3: {"spatial_dims": 3, "shape": [16, 16, 16]}}


def inside_bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work inside the bundle's folder, as its users do, and leave no trace of its `scripts` and seeds in this process.

    Used by a fixture of each test module; the configs write below `output_dir`, which every test sets.
    """
    monkeypatch.chdir(root / "bundle")
    monkeypatch.syspath_prepend(str(root / "bundle"))
    path = list(sys.path)
    yield root / "bundle"
    sys.path[:] = path  # workflows add to it
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
    set_determinism(seed=None)


def files(*names: str) -> list[str]:
    """Name config files as on the command line, from inside the bundle."""
    return [f"configs/{name}.json" for name in names]


def run(run_id: str, *names: str, **overrides: Any) -> None:
    """Do in this process what `python -m monai.bundle run RUN_ID --config_file ...` does, apart from the logging."""
    monai.bundle.run(run_id, config_file=files(*names), logging_file=False, **overrides)


def workflow(kind: str, *names: str, **overrides: Any) -> Any:
    """Return an initialized workflow."""
    made = monai.bundle.create_workflow(config_file=files(*names), workflow_type=kind, logging_file=False, **overrides)
    made.initialize()
    return made


def told(error: BaseException | None) -> str:
    """Return the message of the first `ValueError` below an error, which MONAI wraps per config item and transform."""
    while error is not None and not isinstance(error, ValueError):
        error = error.__cause__
    return "" if error is None else str(error)


def random_network(spatial_dims: int) -> PairNetwork:
    """Return the tiny network of the overrides, every number of it random."""
    return PairNetwork(randomized(CARL(spatial_dims, feature_channels=8, refinement_channels=(4, 8), padding=1))).eval()


def random_weights(path: Path, spatial_dims: int) -> Path:
    """Write the weights of a random tiny network as training does: a flat state dict."""
    torch.save(random_network(spatial_dims).state_dict(), path)
    return path


def blob(shape: Sequence[int], center: Sequence[float], radius: float, seed: int = 0) -> np.ndarray:
    """Return a bright, textured ball, 20 to 120, on background of exactly 0."""
    index = np.indices(shape) - np.reshape(center, [-1] + [1] * len(shape))
    inside = (index**2).sum(axis=0) <= radius**2
    waves = np.random.default_rng(seed).uniform(0.4, 0.9, len(shape))
    texture = 70 + 50 * np.sin(np.tensordot(waves, index, axes=1))
    return np.where(inside, texture, 0).astype(np.float32)


def save_image(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array as NIfTI."""
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def decathlon_folder(folder: Path, count: int = 7, labels: bool = True) -> Path:
    """Make a data set in the layout of the Medical Segmentation Decathlon: balls of two labels, shapes that differ."""
    random = np.random.default_rng(3)
    entries = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        shape = 14 + random.integers(0, 6, 3)
        center = shape / 2 + random.uniform(-1, 1, 3)
        image = blob(shape, center, 6, seed=number)
        label = (image > 0).astype(np.uint8) + (blob(shape, center, 3) > 0)
        name = f"subject_{number:03d}.nii.gz"
        save_image(folder / "imagesTr" / name, image)
        save_image(folder / "labelsTr" / name, label.astype(np.uint8))
        entries.append({"image": f"./imagesTr/{name}", **({"label": f"./labelsTr/{name}"} if labels else {})})
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return folder
