"""The bundle as MONAI runs it: training, evaluation and inference from the configs, and what hosts check."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundle import (
    SIZES,
    TINY_NETWORK,
    TINY_TRAINING,
    blob,
    decathlon_folder,
    files,
    inside_bundle,
    random_network,
    random_weights,
    run,
    save_image,
    told,
    workflow,
)
from ignite.engine import Events
from monai.bundle import ConfigParser

import equireg
from equireg.inferer import RegistrationInferer
from equireg.networks import PairNetwork
from equireg.weights import load_network

CONFIGS = Path(__file__).parents[1] / "bundle" / "configs"
SCALARS = {"val_similarity", "val_regularity", "val_folding", "val_attention_similarity", "val_mean_dice"}


pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")  # MONAI's warning of every config


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decathlon_folder(tmp_path_factory.mktemp("data") / "Task")


def settings(out: Path, dims: int = 2, **more: Any) -> dict[str, Any]:
    return {**TINY_TRAINING, **SIZES[dims], "output_dir": str(out), **more}


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows(path: Path) -> list[dict[str, str]]:
    """Read one of the tables that MONAI's `MetricsSaver` writes."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# ---- training


def test_training_from_the_command_line(bundle: Path, tmp_path: Path) -> None:
    """The one command users type first, in a process of its own."""
    overrides = [f"--{key}={value}" for key, value in settings(tmp_path, tensorboard=True).items()]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json"]
    done = subprocess.run([*command, *overrides], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean_train_loss" in done.stdout and "val_attention_similarity" in done.stdout
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"checkpoint", "model", "events"}


@pytest.mark.parametrize("dims", [2, 3])
def test_training_on_the_embedded_data(dims: int, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("training", "train", **settings(tmp_path, dims, epochs=2, tensorboard=True))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    network = random_network(dims)
    network.load_state_dict(state)  # flat, and strictly the network's
    done = checkpoint(tmp_path)
    assert set(done) == {"model", "optimizer", "lr_scheduler", "sampler", "trainer"}
    assert done["trainer"]["epoch"] == 2 and done["trainer"]["iteration"] == 4
    assert done["model"].keys() == state.keys()
    scalars: dict[str, list[float]] = {}
    for path in sorted(tmp_path.glob("events.*")):
        events = accumulator.EventAccumulator(str(path)).Reload()
        scalars.update({tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert set(scalars) >= SCALARS | {"train_loss"}
    assert all(np.isfinite(values).all() for values in scalars.values())
    assert len(scalars["train_loss"]) == 4
    assert all(len(scalars[name]) == 2 for name in SCALARS)


def test_training_with_an_affine_stage(tmp_path: Path) -> None:
    """With U-Nets and GradICON, in half precision and a validation that asks from turns."""
    stage = {"network_def#net#affine_rounds": 2, "network_def#net#affine_turns": "pi"}
    run("training", "train", **settings(tmp_path, autocast="bfloat16", **stage))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    before = load_network(tmp_path / "model.pt")
    assert before.arguments["affine_turns"] == "pi" and checkpoint(tmp_path)["trainer"]["iteration"] == 2
    tuned = {**settings(tmp_path / "tuned"), "pretrained": str(tmp_path / "model.pt"), "learning_rate": 1e-3, **stage}
    run("training", "train", **tuned)
    after = torch.load(tmp_path / "tuned" / "model.pt", weights_only=True)
    moved = [name for name in state if "weight" in name and not torch.equal(state[name], after[name])]
    assert any("encoder" in name for name in moved) and any("downs" in name for name in moved)


def test_the_network_of_the_default_weights_is_trained(tmp_path: Path) -> None:
    """Attention alone has weights: it is what is trained, and cannot be left out."""
    stage = {"network_def#net#nesting": "attention", "network_def#net#affine_rounds": 2, "flow_rounds": [1, 2]}
    stage["network_def#net#flow_rounds"] = "@flow_rounds"
    run("training", "train", **{**settings(tmp_path), **stage})
    trained = load_network(tmp_path / "model.pt")
    assert trained.arguments["flow_rounds"] == [1, 2] and trained.arguments["nesting"] == "attention"
    with pytest.raises(RuntimeError) as raised:
        run("training", "train", **{**settings(tmp_path / "frozen"), **stage, "train_attention": False})
    assert "nothing is left to train" in str(raised.value.__cause__ or raised.value)


def test_evaluation_wants_the_flow_of_the_weights(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "model.pt", 3)
    with pytest.raises(RuntimeError) as raised:
        run(
            "evaluating",
            "train",
            "evaluate",
            **{**settings(tmp_path, 3, weights=str(weights)), "network_def#net#flow_rounds": [1]},
        )
    assert "network with flow_rounds [], the network has [1]" in str(raised.value.__cause__ or raised.value)


def test_run_trains_and_training_after_it_trains_again(tmp_path: Path) -> None:
    """Two lists of their own: an alias of one to the other would not train the second time."""
    made = workflow("train", "train", **settings(tmp_path))
    steps = []
    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(run_id))
    for run_id in ("run", "training", "training"):
        made.run_id = run_id
        made.run()
    assert steps == ["run"] * 2 + ["training"] * 4


def test_other_losses_take_their_places_and_regularity_warms_up(tmp_path: Path) -> None:
    losses = {
        "similarity": {"_target_": "LocalNormalizedCrossCorrelationLoss", "spatial_dims": 2},
        "regularity": {"_target_": "BendingEnergyLoss"},
    }
    made = workflow("train", "train", **settings(tmp_path, epochs=2), warmup_epochs=1, **losses)
    loss = made.parser.get_parsed_content("loss")
    weights = []
    made.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: weights.append((loss.regularity_weight, loss.consistency_weight))
    )
    made.run()
    assert weights == [(1.5, 0), (0, 1.0)]
    assert all(torch.isfinite(value).all() for value in checkpoint(tmp_path)["model"].values())


def test_gradients_are_clipped_where_that_is_asked_for(tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 1e-3):
        made = workflow("train", "train", **settings(tmp_path / str(limit), max_gradient_norm=limit))
        network = made.parser.get_parsed_content("network_def")
        made.run()
        gradients = [value.grad for value in network.parameters() if value.grad is not None]
        norms[limit] = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norms[0.0] > 2e-3 and norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_follows_the_epochs_that_a_host_asks_for(tmp_path: Path) -> None:
    """MONAI Label sets the trainer's epochs, not the config's."""
    made = workflow("train", "train", **settings(tmp_path), **{"train#trainer#max_epochs": 4})
    (factor,) = made.parser.get_parsed_content("lr_scheduler").lr_lambdas
    assert factor(2) == pytest.approx(0.5) and made.trainer.state.max_epochs == 4


def test_a_new_training_sets_an_earlier_one_aside(tmp_path: Path) -> None:
    for seed in (0, 1):
        run("training", "train", **settings(tmp_path, seed=seed))
        if seed == 0:
            first = (tmp_path / "checkpoint.pt").read_bytes()
    assert (tmp_path / "checkpoint_previous.pt").read_bytes() == first != (tmp_path / "checkpoint.pt").read_bytes()
    assert (tmp_path / "model_previous.pt").exists() and (tmp_path / "model.pt").exists()


def test_training_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("training", "train", **settings(tmp_path / name))
    run("training", "train", **settings(tmp_path / "c", seed=1))
    a, b, c = (checkpoint(tmp_path / name)["model"] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_resume_goes_on_where_training_stopped(tmp_path: Path) -> None:
    options = settings(tmp_path, epochs=3)
    stopped = workflow("train", "train", **options)
    stopped.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.terminate())
    stopped.run()
    assert checkpoint(tmp_path)["trainer"]["epoch"] == 1
    resumed = workflow("train", "train", **options, resume=True)
    optimizer = resumed.parser.get_parsed_content("optimizer")
    seen = []
    resumed.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: seen.append((engine.state.epoch, optimizer.param_groups[0]["lr"]))
    )
    resumed.run()
    rate = 3e-4 / 2  # times 1 + cos, a third and two thirds of the way down
    assert seen == [(2, pytest.approx(rate * 1.5)), (3, pytest.approx(rate * 0.5))]
    done = checkpoint(tmp_path)
    assert done["trainer"]["epoch"] == 3 and done["trainer"]["iteration"] == 6


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"epochs": 3, "val_interval": 2}
    run("training", "train", **settings(tmp_path / "whole", **extra))
    options = settings(tmp_path / "parts", **extra)
    stopped = workflow("train", "train", **options)
    stopped.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    stopped.run()
    run("training", "train", **options, resume=True)
    whole, parts = (checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)


def test_a_longer_training_goes_on_along_the_longer_curve(tmp_path: Path) -> None:
    run("training", "train", **settings(tmp_path, epochs=1))
    resumed = workflow("train", "train", **settings(tmp_path, epochs=3), resume=True)
    optimizer = resumed.parser.get_parsed_content("optimizer")
    seen = []
    resumed.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: seen.append(optimizer.param_groups[0]["lr"])
    )
    resumed.run()
    assert seen == pytest.approx([3e-4 * 0.25, 0.0], abs=1e-9)  # a cosine over three epochs, not over one


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run("training", "train", **settings(tmp_path, resume=True))
    assert "nothing to resume from" in told(caught.value) and str(tmp_path) in told(caught.value)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_training_on_a_folder_of_images(batch_size: int, decathlon: Path, tmp_path: Path) -> None:
    options = settings(tmp_path, 3, dataset_dir=str(decathlon), num_labels=2, batch_size=batch_size)
    run("training", "train", **options)
    assert 0 < checkpoint(tmp_path)["trainer"]["best"] <= 1
    assert (tmp_path / "model.pt").exists()


def test_nan_in_a_training_image_stops_with_its_name_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data, out = decathlon_folder(tmp_path / "data"), tmp_path / "out"
    options = settings(out, 3, dataset_dir=str(data), num_labels=2)
    run("training", "train", **options)
    before = (out / "checkpoint.pt").read_bytes()
    for path in (data / "imagesTr").iterdir():
        image = nib.load(path)
        values = image.get_fdata().astype(np.float32)
        values[3, 4, 5] = np.nan
        save_image(path, values, image.affine)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run("training", "train", **{**options, "epochs": 2, "resume": True})
    message = told(caught.value)
    assert "expects finite values, got NaN or infinity in" in message and "subject_" in message
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    run("training", "train", **settings(tmp_path))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run("training", "train", **settings(tmp_path, epochs=2, resume=True, regularity_weight="$float('nan')"))
    assert "the loss became nan in iteration 3 (epoch 2)" in told(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ---- the overlay for 2D vessel masks


@pytest.fixture(scope="module")
def vessels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make folders of small PNG masks of ten persons, of different sizes, in the layout the overlay reads."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("retina")
    (folder / "retina_hrf").mkdir()
    for number in range(10):
        shape = (40 + number, 44)
        mask = (blob(shape, (15, 18), 11, seed=number) > 70) | (blob(shape, (27, 26), 8, seed=number) > 60)
        for eye in ("g", "h"):
            image.fromarray(mask.astype(np.uint8) * 255).save(folder / "retina_hrf" / f"{number:02d}_{eye}.png")
    return folder


VESSELS = {"shape": [32, 32], "content_size": 24, "batch_size": 2, "val_interval": 1}


@pytest.mark.parametrize("network", ["attention", "unet"])
def test_vessels(network: str, vessels: Path, tmp_path: Path) -> None:
    options = settings(tmp_path, dataset_dir=str(vessels), **VESSELS)
    names = ["train", "vessels"]
    if network == "unet":
        names.append("unet")
        options = {key: value for key, value in options.items() if key not in TINY_NETWORK}
        options["unet_channels"] = [4, 8]
    run("training", *names, **options)
    assert checkpoint(tmp_path)["trainer"]["iteration"] == 2
    run("run", *names, "evaluate", **options, weights=str(tmp_path / "model.pt"))
    raw = rows(tmp_path / "val_mean_dice_raw.csv")
    assert len(raw) == 2 and all(0 <= float(row["mean"]) <= 1 for row in raw)


@pytest.mark.parametrize("overlays, shape", [(("deck", "unet"), (48, 56, 48)), (("vessels", "unet"), (112, 112))])
def test_no_level_of_the_unets_is_a_single_voxel(overlays: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Batch normalization of one voxel learns statistics that the trained network cannot use."""
    net = workflow("train", "train", *overlays).parser.get_parsed_content("network_def").net
    smallest = []
    for module in net.modules():
        if type(module).__name__ == "_Down":
            module.register_forward_hook(lambda _, given, answer: smallest.append(min(answer.shape[2:])))
    with torch.no_grad():
        net(torch.ones(1, 1, *shape), torch.ones(1, 1, *shape))
    assert len(smallest) == 3 + 5 + 5 and min(smallest) > 1


# ---- evaluation


def test_evaluation_writes_a_row_for_every_pair(decathlon: Path, tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "model.pt", 3)
    before = weights.read_bytes()
    options = settings(tmp_path, 3, dataset_dir=str(decathlon), num_labels=2, weights=str(weights))
    run("run", "train", "evaluate", **options)
    assert weights.read_bytes() == before and not (tmp_path / "checkpoint.pt").exists()
    split = {Path(s["image"]).name for s in equireg.lists.decathlon_subjects(decathlon, "test")}
    assert len(split) == 2
    tables = {
        name: rows(tmp_path / f"{name}_raw.csv") for name in ("val_mean_dice", "val_folding", "val_sd_log_jacobian")
    }
    for name, table in tables.items():
        pairs = [row["filename"].split(" -> ") for row in table]
        assert sorted(map(tuple, pairs)) == sorted([tuple(sorted(split)), tuple(sorted(split, reverse=True))]), name
        for row in table:
            values = {key: float(value) for key, value in row.items() if key != "filename"}
            assert np.isfinite(list(values.values())).all() and min(values.values()) >= 0
            assert set(values) == ({"class0", "class1", "mean"} if name == "val_mean_dice" else {"class0", "mean"})
        summary = rows(tmp_path / f"{name}_summary.csv")
        mean = np.mean([float(row["class0"]) for row in table])
        assert float(summary[0]["mean"]) == pytest.approx(mean, abs=1e-3)
        assert set(summary[0]) == {"class", "mean", "std", "min", "max", "median"}
    metrics = dict(line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    assert set(metrics) == {
        *("val_mean_dice", "val_folding", "val_sd_log_jacobian", "val_similarity", "val_attention_similarity")
    }


def test_evaluation_measures_the_given_weights(decathlon: Path, tmp_path: Path) -> None:
    """The table repeats what the network of the file does, worked out by hand."""
    weights = random_weights(tmp_path / "model.pt", 3)
    made = workflow(
        "train",
        "train",
        "evaluate",
        **settings(tmp_path, 3, dataset_dir=str(decathlon), num_labels=2, weights=str(weights), val_pairs=1),
    )
    made.run()
    item = made.parser.get_parsed_content("validate#dataset")[0]
    net = equireg.load_network(weights)
    pair = item["image"][None].as_tensor()
    with torch.no_grad():
        ddf = RegistrationInferer()(pair, PairNetwork(net).eval())[:, :3]
    shape = item["fixed_label"].shape[1:]
    ddf = ddf[(..., *map(slice, shape))]
    moved = equireg.fields.warp(item["moving_label"][None].as_tensor(), ddf, mode="nearest", padding="zeros")[0]
    row = rows(tmp_path / "val_mean_dice_raw.csv")[0]
    for label in (1, 2):
        a, b = moved == label, item["fixed_label"].as_tensor() == label
        dice = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert float(row[f"class{label - 1}"]) == pytest.approx(float(dice), abs=1e-3)
    folding = float(equireg.metrics.folding_fraction(ddf))
    assert float(rows(tmp_path / "val_folding_raw.csv")[0]["mean"]) == pytest.approx(folding, abs=1e-3)


def test_training_with_the_evaluation_config_on_top_trains(tmp_path: Path) -> None:
    run("training", "train", "evaluate", **settings(tmp_path))
    assert checkpoint(tmp_path)["trainer"]["iteration"] == 2


def test_evaluation_of_the_embedded_data(tmp_path: Path) -> None:
    run("evaluating", "train", "evaluate", **settings(tmp_path, weights=str(random_weights(tmp_path / "w.pt", 2))))
    names = [row["filename"] for row in rows(tmp_path / "val_folding_raw.csv")]
    assert names == ["synthetic -> synthetic"] * 2


# ---- inference


def oblique(spacing: tuple[float, ...], angle: float, origin: tuple[float, ...]) -> np.ndarray:
    """Return an affine whose axes are turned in the x-y plane and, in 3D, flipped along the last one."""
    affine = np.eye(4)
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    dims = len(spacing)
    affine[:dims, :dims] = (turn @ np.diag([1, 1, -1]))[:dims, :dims] @ np.diag(spacing)
    affine[:dims, 3] = origin
    return affine


GRIDS = {
    2: (oblique((1.5, 2.0), 0.4, (30, -10)), oblique((1.5, 2.0), 0.4, (-20, 35)), oblique((1.1, 1.4), -0.2, (3, 4))),
    3: (
        oblique((1.5, 2.0, 1.0), 0.4, (30, -10, 5)),
        oblique((1.5, 2.0, 1.0), 0.4, (-20, 35, 12)),
        oblique((1.2, 1.0, 1.3), -0.2, (3, 4, 5)),
    ),
}
SHAPES = {2: ((30, 26), (24, 34), (36, 31)), 3: ((17, 20, 18), (20, 16, 22), (19, 21, 20))}


@pytest.fixture
def pairs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """Make three images of a ball: the first two share spacing and direction, the third shares neither."""
    dims = request.param
    for name, shape, affine, seed in zip(("fixed", "near", "far"), SHAPES[dims], GRIDS[dims], range(3)):
        center = [size / 2 + shift for size, shift in zip(shape, (1, -1.5, 0.5))]
        save_image(tmp_path / f"{name}.nii.gz", blob(shape, center, 5, seed), affine)
    return tmp_path, dims


def infer_options(folder: Path, dims: int, **more: Any) -> dict[str, Any]:
    weights = str(random_weights(folder / "w.pt", dims))
    return {"output_dir": str(folder / "out"), "weights": weights, "progress": False, **more}


def check_result(folder: Path, moving: str, moved: Path) -> nib.Nifti1Image:
    """Assert that a moved image has the fixed grid and the moving image's intensities, and return it."""
    fixed, image = nib.load(folder / "fixed.nii.gz"), nib.load(moved)
    assert image.shape[: len(fixed.shape)] == fixed.shape and np.prod(image.shape) == np.prod(fixed.shape)
    assert np.allclose(image.affine, fixed.affine, atol=1e-5)
    values, source = image.get_fdata(), nib.load(folder / f"{moving}.nii.gz").get_fdata()
    assert values.min() >= 0 and 60 < values.max() <= source.max() + 1e-3
    return image


def check_field(folder: Path, moving: str, moved: Path, field: Path, dims: int) -> None:
    """Assert that ITK, given the moving image and the field alone, makes the same moved image."""
    sitk = pytest.importorskip("SimpleITK")
    transform = sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(str(field)), sitk.sitkVectorFloat64))
    source, fixed = (sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkFloat32) for name in (moving, "fixed"))
    assert source.GetDimension() == fixed.GetDimension() == transform.GetDimension() == dims
    resampled = sitk.GetArrayFromImage(sitk.Resample(source, fixed, transform, sitk.sitkLinear, 0.0)).T
    values = nib.load(moved).get_fdata().reshape(resampled.shape)
    assert resampled.max() > 60
    assert np.abs(values - resampled).max() < 1e-4 * 120


@pytest.mark.parametrize(("name", "spacing"), [("brain", 2.0), ("hippocampus", 1.0), ("vessels", None)])
def test_names_of_weights_choose_network_and_spacing(name: str, spacing: float | None, tmp_path: Path) -> None:
    for configs, key in ((["inference"], "weights"), (["train", "finetune"], "pretrained")):
        parser = ConfigParser(ConfigParser.load_config_files(files(*configs)))
        parser[key] = name
        assert parser.get_parsed_content("network_def").net.arguments == load_network(name).arguments
        assert parser.get_parsed_content("spacing") == spacing
    if name == "brain":
        parser = ConfigParser(ConfigParser.load_config_files(files("train", "finetune")))
        assert parser.get_parsed_content("spacing") == spacing, "the default"


@pytest.mark.parametrize("pairs", [2, 3], indirect=True)
@pytest.mark.parametrize("form", ["csv", "json"])
def test_inference_of_a_list(form: str, pairs: tuple[Path, int]) -> None:
    folder, dims = pairs
    listed = [{"moving": f"{name}.nii.gz", "fixed": "fixed.nii.gz"} for name in ("near", "far")]
    path = folder / f"pairs.{form}"
    if form == "json":
        path.write_text(json.dumps({"pairs": listed}))
    else:
        path.write_text("\n".join(["moving,fixed", *(f"{p['moving']},{p['fixed']}" for p in listed)]))
    run("run", "inference", **infer_options(folder, dims, pairs=str(path)))
    found = sorted(p.name for p in (folder / "out").iterdir())
    kinds = ("moved", "fixed_to_moving", "moving_to_fixed")
    assert found == sorted(f"{name}_to_fixed_{kind}.nii.gz" for name in ("near", "far") for kind in kinds)
    for name in ("near", "far"):
        moved, field = (folder / "out" / f"{name}_to_fixed_{kind}.nii.gz" for kind in kinds[:2])
        check_result(folder, name, moved)
        check_field(folder, name, moved, field, dims)


@pytest.mark.parametrize("pairs", [3], indirect=True)
def test_inference_of_one_pair_by_flags(pairs: tuple[Path, int]) -> None:
    folder, dims = pairs
    options = infer_options(folder, dims, moving=str(folder / "near.nii.gz"), fixed=str(folder / "fixed.nii.gz"))
    run("run", "inference", **options)
    assert len(list((folder / "out").iterdir())) == 3


def test_inference_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, shape in (("a", (30, 24)), ("b", (26, 33))):
        image.fromarray(blob(shape, (13, 12), 7).astype(np.uint8)).save(tmp_path / f"{name}.png")
    options = infer_options(tmp_path, 2, moving=str(tmp_path / "a.png"), fixed=str(tmp_path / "b.png"))
    run("run", "inference", **options)
    assert len(list((tmp_path / "out").iterdir())) == 3


def stored_as(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """Return the same image of the world with its axes stored in another order and direction; 2D images stay 2D."""
    values, dims = image.get_fdata(dtype=np.float32), len(image.shape)
    start = nib.io_orientation(image.affine)
    change = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes.ljust(3, "S")[:3]))
    affine = image.affine @ nib.orientations.inv_ornt_aff(change, (*image.shape, *[1] * (3 - dims)))
    return nib.Nifti1Image(nib.orientations.apply_orientation(values, change[:dims]), affine)


def in_world(path: Path, vectors: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of an image or a field file stored as RAS, and the affine of that array."""
    image = nib.load(path)
    dims = image.shape[-1] if vectors else len(image.shape)
    values = image.get_fdata().reshape(*image.shape[:dims], -1)
    channels = [stored_as(nib.Nifti1Image(channel, image.affine), "RAS") for channel in np.moveaxis(values, -1, 0)]
    return np.stack([channel.get_fdata() for channel in channels]), channels[0].affine


ORDERS = {2: [("LA", "RA"), ("PR", "PR"), ("AL", "RP")], 3: [("LPS", "LPS"), ("SLA", "SLA"), ("IRP", "ALS")]}


@pytest.mark.parametrize("pairs", [2, 3], indirect=True)
def test_inference_does_not_depend_on_how_files_are_stored(pairs: tuple[Path, int]) -> None:
    folder, dims = pairs
    names = ("near", "far", "fixed")
    images = {name: stored_as(nib.load(folder / f"{name}.nii.gz"), "RAS"[:dims]) for name in names}
    results = []
    for moving_codes, fixed_codes in [("RAS"[:dims],) * 2, *ORDERS[dims]]:
        place = folder / f"{moving_codes}_{fixed_codes}"
        place.mkdir()
        for name, image in images.items():
            nib.save(stored_as(image, fixed_codes if name == "fixed" else moving_codes), place / f"{name}.nii.gz")
        assert nib.aff2axcodes(nib.load(place / "fixed.nii.gz").affine)[:dims] == tuple(fixed_codes)
        listed = [{"moving": f"{name}.nii.gz", "fixed": "fixed.nii.gz"} for name in ("near", "far")]
        (place / "pairs.json").write_text(json.dumps(listed))
        torch.manual_seed(0)  # of the network's weights
        run("run", "inference", **infer_options(place, dims, pairs=str(place / "pairs.json")))
        for name in ("near", "far"):
            moved, field = (place / "out" / f"{name}_to_fixed_{kind}.nii.gz" for kind in ("moved", "fixed_to_moving"))
            check_result(place, name, moved)
            assert np.allclose(nib.load(field).affine, nib.load(place / "fixed.nii.gz").affine, atol=1e-5)
            check_field(place, name, moved, field, dims)
            results.append((name, in_world(moved), in_world(field, vectors=True)))
    for k, (name, moved, field) in enumerate(results):
        assert name == results[k % 2][0]
        # Headers round the corner a file starts at, another one in each order, to 4e-6 mm; values change by 50 a voxel.
        for found, expected, atol in ((moved, results[k % 2][1], 1e-3), (field, results[k % 2][2], 1e-4)):
            assert np.allclose(found[1], expected[1], atol=1e-4)
            assert found[0].shape == expected[0].shape and np.abs(found[0] - expected[0]).max() < atol
    # The answers are far from one vector, so that the test can tell.
    assert min(field[0].reshape(dims, -1).std(axis=1).min() for _, _, field in results) > 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no pair to register: give --moving and --fixed, or --pairs with a JSON or CSV list"),
        ({"moving": "a.nii.gz"}, "a pair needs both images, got moving 'a.nii.gz' and fixed ''"),
        ({"moving": "a.nii.gz", "fixed": "b.nii.gz"}, "the image 'a.nii.gz' does not exist"),
        ({"pairs": "none.csv"}, "none.csv"),
    ],
)
def test_inference_of_nothing_is_one_clear_error(given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run("run", "inference", **infer_options(tmp_path, 2, **given))
    assert message in told(caught.value)


@pytest.mark.parametrize("pairs", [3], indirect=True)
def test_inference_for_a_host_that_serves_one_image(pairs: tuple[Path, int]) -> None:
    """MONAI Label hands over `image` and what its client sent, calls the parts, and takes `pred` and `result`."""
    folder, dims = pairs
    made = workflow("infer", "inference", **infer_options(folder, dims))
    item = made.preprocessing({"image": str(folder / "fixed.nii.gz"), "moving": "near.nii.gz"})
    with torch.no_grad():
        item["pred"] = made.inferer(item["image"][None], made.network_def.to(made.device).eval())[0]
    done = made.postprocessing(item)
    fixed, written = nib.load(folder / "fixed.nii.gz"), nib.load(folder / "out" / "near_to_fixed_moved.nii.gz")
    assert done["pred"].shape == (1, *fixed.shape) and np.allclose(done["pred"].affine, fixed.affine, atol=1e-5)
    assert np.array_equal(done["pred"][0], written.get_fdata())
    report = done["result"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["files"].keys() == {"fixed_to_moving", "moving_to_fixed"}
    assert all(Path(path).parent == folder / "out" and Path(path).exists() for path in report["files"].values())
    assert report["moving"]["file"] == str(folder / "near.nii.gz") and report["similarity"].keys() >= {
        "before",
        "after",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "fixed.nii.gz"}, "a moving image 'moving', got 'fixed.nii.gz' and None"),
        ({"moving": "moving.nii.gz"}, "a pair needs a fixed image 'image'"),
        ({"image": "", "moving": "moving.nii.gz"}, "a pair needs a fixed image 'image'"),
        (
            {"image": "images/fixed.nii.gz", "moving": "moving.nii.gz"},
            "the image 'images/moving.nii.gz' does not exist",
        ),
    ],
)
def test_a_host_that_serves_no_pair_is_told(given: dict[str, str], message: str, tmp_path: Path) -> None:
    made = workflow("infer", "inference", **infer_options(tmp_path, 2))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        made.preprocessing(given)
    assert message in told(caught.value)


# ---- what hosts check


@pytest.mark.parametrize(
    ("kind", "names"),
    [("train", ["train"]), ("train", ["train", "evaluate"]), ("train", ["train", "vessels"]), ("infer", ["inference"])],
)
def test_properties(kind: str, names: list[str], vessels: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": str(tmp_path), "progress": False}
    if kind == "train":
        options |= {**TINY_NETWORK, "tensorboard": False}
    if "vessels" in names:
        options["dataset_dir"] = str(vessels)
    made = workflow(kind, *names, **options)
    assert made.check_properties() == []
    assert isinstance(made.network_def, torch.nn.Module)


@pytest.mark.parametrize("config", ["train", "inference"])
def test_network_takes_and_gives_what_metadata_says(config: str) -> None:
    monai.bundle.verify_net_in_out("network_def", "configs/metadata.json", files(config), device="cpu", p=1, n=1)


def test_metadata_fits_the_schema(root: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = root / "tests" / "metadata_schema.json"
    monai.bundle.verify_metadata("configs/metadata.json", filepath=str(schema))


@pytest.mark.parametrize("damage", ["version", "network_data_format", "image"])
def test_the_schema_tells_what_is_missing(damage: str, root: Path, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    if damage == "image":
        metadata["network_data_format"]["inputs"] = {}
    else:
        del metadata[damage]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="(?s)metadata failed to verify|required property|minProperties|non-empty"):
        monai.bundle.verify_metadata(
            str(tmp_path / "metadata.json"), filepath=str(root / "tests" / "metadata_schema.json")
        )


def test_versions_are_one() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] == equireg.__version__
    assert metadata["version"] in metadata["changelog"]
    lines = [line.split(";")[0].strip() for line in (CONFIGS.parents[1] / "constraints.txt").read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    stated = {package: metadata[key] for package, key in named.items()} | metadata["required_packages_version"]
    assert stated == {package: pinned[package] for package in stated}


def test_train_and_inference_define_one_network() -> None:
    """Hosts train from the weights that they infer with, by these two files."""
    made = [monai.bundle.ConfigParser.load_config_files(files(name)) for name in ("train", "inference")]
    parsers = [monai.bundle.ConfigParser(config) for config in made]
    train, inference = (parser.get_parsed_content("network_def").net for parser in parsers)
    assert train.arguments == inference.arguments == equireg.load_network("brain").arguments


def targets(value: Any) -> Iterator[str]:
    """Yield every `_target_` of a config."""
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from targets(entry)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_config_parses_and_names_what_exists(path: Path) -> None:
    config = json.loads(path.read_text())
    for target in targets(config):
        if target.startswith("equireg") or not target.startswith("scripts."):
            assert not target.startswith("equireg"), f"{target}: the bundle must not need the installed package"
            continue
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"{path.name}: {target} does not exist"
