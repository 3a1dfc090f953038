"""Trained weights: reading, refusing and writing files of them, and the ones the bundle ships."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_networks import SMALL, content, randomized

from equireg import weights
from equireg.networks import CARL, PairNetwork
from equireg.weights import average_weights, load_network, read_state, save_atomically, save_weights, shipped_weights

MODELS = Path(__file__).parents[1] / "bundle" / "models"
CONFIGS = MODELS.parent / "configs"
SHIPPED = sorted(shipped_weights()) or [pytest.param("", marks=pytest.mark.skip("metadata.json lists no weights yet"))]


@pytest.fixture
def net() -> CARL:
    return randomized(CARL(2, in_channels=2, nesting="left", extra_refinements=1, **SMALL))


def written(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# ---- loading from files


@pytest.mark.parametrize("form", ["flat", "checkpoint", "prefixed", "prefixed checkpoint"])
def test_load_from_a_file(form: str, net: CARL, tmp_path: Path) -> None:
    state = PairNetwork(net).state_dict() if "prefixed" in form else net.state_dict()
    stored = {"model": state, "trainer": {"epoch": 3}} if "checkpoint" in form else state
    loaded = load_network(written(stored, tmp_path / "any.pt"))
    assert isinstance(loaded, CARL) and not loaded.training and loaded.arguments == net.arguments
    assert not any(module.training for module in loaded.modules())
    pair = content(12, 13, channels=2, seed=1), content(11, 15, channels=2, seed=2)
    with torch.no_grad():
        assert torch.equal(loaded(*pair), net(*pair))


def test_load_takes_a_path_as_text(net: CARL, tmp_path: Path) -> None:
    path = written(net.state_dict(), tmp_path / "any.pt")
    assert load_network(str(path), device="cpu").arguments == net.arguments


def test_half_precision_on_disk_is_float32_in_memory(net: CARL, tmp_path: Path) -> None:
    digest = save_weights(written({"model": PairNetwork(net).state_dict()}, tmp_path / "c.pt"), tmp_path / "model.pt")
    assert digest == hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(name.startswith("net.") for name in stored)  # fits the bundle's `network_def`
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.float16}
    loaded = load_network(tmp_path / "model.pt")
    for name, value in net.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), value.half().float())
    PairNetwork(CARL(**net.arguments)).load_state_dict(stored)


def test_an_average_lies_between_the_weights(net: CARL, tmp_path: Path) -> None:
    other = randomized(CARL(**net.arguments)).half()
    for name, value in other.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    paths = [written(net.state_dict(), tmp_path / "a.pt")]
    paths.append(written({"model": PairNetwork(other).state_dict()}, tmp_path / "b.pt"))  # a checkpoint
    average_weights(paths, tmp_path / "mean.pt")
    mean = load_network(tmp_path / "mean.pt")
    assert mean.arguments == net.arguments
    theirs, ours = other.state_dict(), mean.state_dict()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            between = 0.5 * (value + theirs[name].float())
            assert torch.allclose(ours[name], between) and not torch.allclose(between, value)
        else:
            assert torch.equal(ours[name], value)
    assert any("running_var" in name for name in ours) and any(name.endswith("tracked") for name in ours)
    average_weights(paths[:1], tmp_path / "same.pt")
    same = load_network(tmp_path / "same.pt").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in net.state_dict().items())


def test_weights_of_different_networks_are_not_averaged(net: CARL, tmp_path: Path) -> None:
    first = written(net.state_dict(), tmp_path / "a.pt")
    for number, change in enumerate(({"padding": 5}, {"feature_channels": 6})):  # the first has the same shapes
        other = written(CARL(**{**net.arguments, **change}).state_dict(), tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match=rf"expected weights of one network, got others in .*{number}\.pt than in"):
            average_weights([first, other], tmp_path / "mean.pt")
    with pytest.raises(ValueError, match="expected at least one weights file to average, got none"):
        average_weights([], tmp_path / "mean.pt")
    assert not (tmp_path / "mean.pt").exists()


# ---- what cannot be loaded


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights 'liver': neither a file nor one of the shipped"):
        load_network("liver")
    with pytest.raises(FileNotFoundError, match="neither a file"):
        load_network(tmp_path)  # a folder


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_file(keep: int, net: CARL, tmp_path: Path) -> None:
    path = written(net.state_dict(), tmp_path / "cut.pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pt is not a readable weights file"):
        load_network(path)


def test_missing_weights(net: CARL, tmp_path: Path) -> None:
    state = net.state_dict()
    name = next(name for name in state if name.endswith("weight"))
    del state[name]
    with pytest.raises(ValueError, match=rf"(?s)part\.pt do not fit the network.*{name}"):
        load_network(written(state, tmp_path / "part.pt"))


def test_weights_of_other_shapes(net: CARL, tmp_path: Path) -> None:
    other = CARL(**{**net.arguments, "feature_channels": 16})
    state = {**net.state_dict(), "_extra_state": other.get_extra_state()}
    with pytest.raises(ValueError, match="(?s)do not fit the network.*size mismatch"):
        load_network(written(state, tmp_path / "other.pt"))


def test_weights_that_do_not_say_of_what(net: CARL, tmp_path: Path) -> None:
    state = {name: value for name, value in net.state_dict().items() if name != "_extra_state"}
    with pytest.raises(ValueError, match="does not say which network it belongs to"):
        load_network(written(state, tmp_path / "bare.pt"))


@pytest.mark.parametrize("stored", [[1, 2], {}, {"epoch": 3}, torch.zeros(2), {"model": {"a": 1}}])
def test_files_of_something_else(stored: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state(written(stored, tmp_path / "else.pt"))


class Intruder:
    """Marks the file system when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickled_objects_are_refused_and_not_run(writer: str, net: CARL, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "it_ran"
    stored = {**net.state_dict(), "more": Intruder(mark)}
    if writer == "torch":
        torch.save(stored, path)
    else:
        path.write_bytes(pickle.dumps(stored))
    with pytest.raises(ValueError, match="not a readable weights file"):
        load_network(path)
    assert not mark.exists()


# ---- writing


def test_save_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.pt"
    for number in (1.0, 2.0):
        save_atomically({"x": torch.tensor(number)}, path)
        assert torch.load(path, weights_only=True)["x"] == number
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "kill"])
def test_a_failure_while_writing_keeps_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"x": torch.tensor(1.0)}, path)

    def failing(content: Any, target: Path) -> None:
        Path(target).write_bytes(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(weights.torch, "save", failing)
        with pytest.raises(type(error)):
            save_atomically({"x": torch.tensor(2.0)}, path)
    assert torch.load(path, weights_only=True)["x"] == 1
    assert list(tmp_path.iterdir()) == [path]


# ---- what the bundle ships


def test_a_damaged_shipped_file_is_told(net: CARL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "toy.pt"
    digest = save_weights(written(net.state_dict(), tmp_path / "net.pt"), path)
    record = {"toy": {"file": "toy.pt", "sha256": digest, "network": net.arguments}}
    monkeypatch.setattr(weights, "shipped_weights", lambda: record)
    monkeypatch.setattr(weights, "_bundle_folder", lambda name: tmp_path / name)
    assert load_network("toy").arguments == net.arguments
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"toy\.pt are damaged: their hash is not the recorded one"):
        load_network("toy")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_what_their_record_says(name: str) -> None:
    record = shipped_weights()[name]
    path = MODELS / record["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    assert path.stat().st_size < 25e6
    network = load_network(name)
    assert network.arguments == record["network"]
    assert not network.training
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in network.parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_register(name: str) -> None:
    network = load_network(name)
    image = content(*[24] * network.spatial_dims, channels=network.in_channels)
    with torch.no_grad():
        ddf = network(image, image)
    assert ddf.shape == (1, network.spatial_dims, *image.shape[2:]) and torch.isfinite(ddf).all()


@pytest.mark.parametrize(
    ("config", "file"), [("train", "model.pt"), ("deck", "hippocampus.pt"), ("vessels", "vessels.pt")]
)
def test_shipped_weights_fit_the_configs(config: str, file: str) -> None:
    """Hosts load `models/model.pt` into the network of train.json; recipes make the weights called like them."""
    state = torch.load(MODELS / file, weights_only=True)
    assert all(torch.is_tensor(value) for value in state.values()), f"{file} must be a flat state dict"
    content = json.loads((CONFIGS / f"{config}.json").read_text())
    definition = content.get("network_def#net") or content["network_def"]["net"]
    arguments = {key: value for key, value in definition.items() if key != "_target_"}
    arguments.update(spatial_dims=content.get("spatial_dims", 3), flow_rounds=content["flow_rounds"])
    network = PairNetwork(CARL(**arguments))
    network.load_state_dict(state)
    assert json.loads(bytes(state["net._extra_state"].tolist())) == network.net.arguments


@pytest.mark.parametrize("other", [{"factor": 2}, {"padding": 0}, {"nesting": "right"}])
def test_weights_of_another_network_are_refused_though_shapes_agree(other: dict[str, Any]) -> None:
    small: dict[str, Any] = {"feature_channels": 8, "refinement_channels": (4, 8)}
    state = CARL(2, **small, **other).state_dict()
    with pytest.raises(ValueError, match="belong to another network: " + next(iter(other))):
        CARL(2, **small).load_state_dict(state)


@pytest.mark.parametrize("entry", [torch.zeros(3), torch.tensor([1, 2, 250], dtype=torch.uint8)])
def test_a_garbled_description_is_told(entry: torch.Tensor, tmp_path: Path) -> None:
    state = {**CARL(2, feature_channels=8, refinement_channels=(4, 8)).state_dict(), "_extra_state": entry}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt does not describe a network"):
        load_network(tmp_path / "model.pt")
