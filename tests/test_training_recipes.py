"""Trainings on labels: of labeled images, and of images painted from label maps alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers_bundle import TINY_TRAINING, blob, inside_bundle, run, save_image
from monai.bundle import ConfigParser
from monai.transforms import Compose

from equireg.weights import load_network

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
    options = {**SMALL, "num_labels": 20, "shape": [16, 16, 16], "spatial_dims": 3, "train#random_transforms": []}
    run("training", "train", "labels", **options, label_weight=weight, output_dir=str(tmp_path / "labels"))
    run("training", "train", **options, regularity_weight=0.5, output_dir=str(tmp_path / "images"))
    with_labels, without = learned(tmp_path / "labels"), learned(tmp_path / "images")
    same = all(torch.equal(with_labels[name], without[name]) for name in without if "weight" in name)
    assert same == (weight == 0.0)


def test_labels_move_along_when_labeled_pairs_are_varied(tmp_path: Path) -> None:
    """The stock variations of `labels.json`: label follows image, background stays 0, and both sides differ."""
    parser = ConfigParser()
    parser.read_config([f"configs/{name}.json" for name in ("train", "labels")])
    vary = Compose(parser.get_parsed_content("train#random_transforms")).set_random_state(0)
    box = torch.zeros(1, 32, 32, 32)
    box[:, 8:24, 10:22, 9:20] = 1.0
    item = {key: box.clone() for key in ("moving", "moving_label", "fixed", "fixed_label")}
    sizes = set()
    for _ in range(5):
        out = vary(item)
        for side in ("moving", "fixed"):
            image, label = out[side].as_tensor(), out[f"{side}_label"].as_tensor()
            assert set(label.unique().tolist()) <= {0.0, 1.0} and (image == 0).any()
            assert ((image > 0.5) == (label > 0.5)).float().mean() > 0.99
            sizes.add(int(label.sum()))
    assert len(sizes) > 5
    run("training", "train", "labels", **SMALL, num_labels=20, shape=[16, 16, 16], output_dir=str(tmp_path / "out"))


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


def test_unets_of_the_brain_are_learned_from_aligned_patches(label_maps: Path, tmp_path: Path) -> None:
    options = {k: v for k, v in SMALL.items() if not k.startswith("network_def")}
    options = {**options, "dataset_dir": str(label_maps), "shape": [24, 24, 24], "patch": [16, 20, 24], "val_pairs": 2}
    run("training", "train", "brain", **options, output_dir=str(tmp_path / "out"))
    assert all(torch.isfinite(value).all() for value in learned(tmp_path / "out").values())
    parser = ConfigParser()
    parser.read_config([f"configs/{name}.json" for name in ("train", "brain")])
    parser.update({"dataset_dir": str(label_maps), "shape": [24, 24, 24], "patch": [16, 20, 24]})
    item = parser.get_parsed_content("train#dataset")[0]
    assert item["image"].shape == (2 * (1 + 1 + 8 + 4), 16, 20, 24)


@pytest.fixture
def brain_attention(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "results"))
    return importlib.import_module("brain_attention")


@pytest.mark.parametrize("start", [[0, 0, 0], [2, 0, 1]])
def test_pooled_places_are_those_of_the_content(start: list[int], brain_attention: ModuleType) -> None:
    """Two images of one size, pooled from different voxels on: equal shapes, and places in pooled voxels."""
    shape = (7, 6, 8)
    place = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in shape), indexing="ij"))
    known = torch.zeros(1, *shape)
    known[:, 1:5, 2:5, 3:7] = 1
    item = {"moving": 2 * known, "moving_coordinates": torch.cat([place, known])}
    image, places, share = brain_attention.pooled(item, "moving", 3, start)
    assert image.shape == (1, 3, 3, 4) and places.shape == (3, 3, 3, 4) and share.shape == (3, 3, 4)
    assert share.sum() * 27 == pytest.approx(known.sum().item()) and torch.allclose(image[0], 2 * share)
    block = [torch.arange(3.0) + 3 - begin for begin in start]  # the voxels of pooled voxel (1, 1, 1)
    inside = [axis[(axis >= low) & (axis < high)] for axis, (low, high) in zip(block, ((1, 5), (2, 5), (3, 7)))]
    assert places[:, 1, 1, 1].tolist() == pytest.approx([axis.mean().item() / 3 for axis in inside])


def test_correspondence_is_least_where_partners_look_alike(brain_attention: ModuleType) -> None:
    places = 4 * torch.stack(torch.meshgrid(*[torch.arange(3.0)] * 3, indexing="ij"))  # far apart: one partner each
    features = 4 * torch.eye(27).reshape(27, 3, 3, 3)  # each voxel its own, of length 4
    shares = torch.ones(2, 3, 3, 3)
    turned = [torch.stack([part, part.flip(1)]) for part in (features, places)]
    right = brain_attention.correspondence(*turned, shares)
    wrong = brain_attention.correspondence(torch.stack([features, features]), turned[1], shares)
    indifferent = brain_attention.correspondence(torch.zeros(2, 27, 3, 3, 3), turned[1], shares)
    far = [turned[0], torch.stack([places, places + 100])]
    assert brain_attention.correspondence(*far, shares) == 0 == brain_attention.correspondence(*turned, 0 * shares)
    assert right < indifferent < wrong and indifferent.item() == pytest.approx(np.log(27), rel=1e-5)


def test_attention_is_trained_and_the_weights_are_those_of_the_whole_network(
    brain_attention: ModuleType, label_maps: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "model.pt")
    states = []
    for steps in (1, 2):
        brain_attention.main(str(label_maps), output, steps=steps, pairs=1)
        network = load_network(output)
        assert network.arguments == load_network("brain").arguments
        states.append(network.state_dict())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0] if "conv.weight" in name)
