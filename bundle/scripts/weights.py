"""Find, read and check trained weights, and rebuild the network they belong to."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .networks.carl import CARL, arguments_from_state
from .networks.pair import PairNetwork

__all__ = [
    "average_weights",
    "load_into",
    "load_network",
    "read_state",
    "read_tensors",
    "save_atomically",
    "save_weights",
    "shipped_weights",
    "training_spacing",
    "weights_record",
]

_ARGUMENTS_KEY = "_extra_state"


def _bundle_folder(name: str) -> Path:
    """Return a folder of the bundle, which lies beside the package in a checkout and inside it once installed."""
    here = Path(__file__).resolve().parent
    inside, beside = here / name, here.parent / name
    return inside if inside.is_dir() else beside


def shipped_weights() -> dict[str, dict[str, Any]]:
    """Return what the bundle's metadata says of the weights it ships.

    Returns:
        Name of the weights to their record: `file`, `sha256`, `network` (the arguments of `CARL`), `spacing_mm` (the
        spacing they were trained for, or None where it has no meaning), `extent_voxels` (how long the content was along
        its longest axis), and what they are.

    Example:
        >>> all({"file", "sha256", "network"} <= set(record) for record in shipped_weights().values())
        True
    """
    metadata = json.loads((_bundle_folder("configs") / "metadata.json").read_text())
    return metadata["weights"]


def weights_record(name_or_path: str | Path) -> dict[str, Any]:
    """Return what is known of a set of weights without loading it.

    Args:
        name_or_path: name of shipped weights, or the path of a weights file.

    Returns:
        At least its `name` and the `sha256` of the file; for shipped weights, also where a path leads to them, their
        record as well, see `shipped_weights`.

    Raises:
        FileNotFoundError: if the name is no shipped one and no file has that path.

    Example:
        >>> weights_record("hippocampus")["spacing_mm"]
        1.0
    """
    shipped = shipped_weights()
    if str(name_or_path) in shipped:
        return {"name": str(name_or_path), **shipped[str(name_or_path)]}
    path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights '{name_or_path}': neither a file nor one of the shipped {', '.join(sorted(shipped))}."
        )
    sha256 = _sha256(path)
    known = next((record for record in shipped.values() if record["sha256"] == sha256), {})
    return {**known, "file": str(path.absolute()), "name": str(name_or_path), "sha256": sha256}


def training_spacing(name_or_path: str | Path) -> float | None:
    """Return the spacing that a set of weights was trained for.

    Args:
        name_or_path: name of shipped weights, or the path of a weights file.

    Returns:
        Millimeters; None if it is not known or has no meaning, so that images keep theirs.

    Raises:
        FileNotFoundError: if the name is no shipped one and no file has that path.

    Example:
        >>> training_spacing("hippocampus"), training_spacing("vessels")
        (1.0, None)
    """
    return weights_record(name_or_path).get("spacing_mm")


def load_network(name_or_path: str | Path, device: str | torch.device = "cpu") -> CARL:
    """Load a shipped or trained registration network, ready to use.

    Args:
        name_or_path: name of shipped weights, such as "hippocampus" or "vessels", or the path of a file that training
            wrote: a flat state dict, or a checkpoint that holds one under "model".
        device: where the network is put.

    Returns:
        The network in eval mode and float32, called `net(moving, fixed)`.

    Raises:
        FileNotFoundError: if the name is no shipped one and no file has that path.
        ValueError: if the file holds no weights, or weights that do not fit the network they describe, or if a shipped
            file is damaged.

    Example:
        >>> network = load_network("vessels")
        >>> network(torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64)).shape
        torch.Size([1, 2, 64, 64])
    """
    path = _weights_file(name_or_path)
    state = read_state(path)
    if _ARGUMENTS_KEY not in state:
        raise ValueError(f"{path} does not say which network it belongs to (no entry '{_ARGUMENTS_KEY}').")
    try:
        network = CARL(**arguments_from_state(state[_ARGUMENTS_KEY]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a network that can be built: {error}") from error
    _fill(network, state, path)
    return network.to(device).eval()


def load_into(network: nn.Module, name_or_path: str | Path, same_flow: bool = False) -> None:
    """Load weights into a network that is already built, all of them or none.

    Args:
        network: a registration network, or a `PairNetwork` around one.
        name_or_path: name of shipped weights, or the path of a flat state dict or of a checkpoint that holds one under
            "model", from any device.
        same_flow: whether the network must end with as much optical flow as the one whose weights they are: where it is
            to answer as that one does, and not to be trained on.

    Raises:
        FileNotFoundError: if the name is no shipped one and no file has that path.
        ValueError: if the file holds no weights, or those of another network.
    """
    path = _weights_file(name_or_path)
    state = read_state(path)
    network = network.net if isinstance(network, PairNetwork) else network
    if same_flow and isinstance(network, CARL) and _ARGUMENTS_KEY in state:
        theirs, mine = (
            list(arguments.get("flow_rounds", []))
            for arguments in (arguments_from_state(state[_ARGUMENTS_KEY]), network.arguments)
        )
        if theirs != mine:
            raise ValueError(f"{path} belongs to a network with flow_rounds {theirs}, the network has {mine}.")
    _fill(network, state, path)


def _weights_file(name_or_path: str | Path) -> Path:
    """Return the path of a weights file, and refuse a shipped one that is damaged."""
    record = weights_record(name_or_path)
    path = _bundle_folder("models") / record["file"]  # the path of another file is absolute, and stays
    if _sha256(path) != record["sha256"]:
        raise ValueError(f"the shipped weights {path} are damaged: their hash is not the recorded one.")
    return path


def _fill(network: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Load a state dict, whose origin the error names."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the weights in {path} do not fit the network: {error}") from error


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the state dict of a registration network from a weights file or a checkpoint.

    Args:
        path: a flat state dict, or a dictionary that holds one under "model"; names may carry `PairNetwork`'s prefix.

    Returns:
        Parameter name of the network, without that prefix, to tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no weights file {path}.")
    content = read_tensors(path, "weights file")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    named = isinstance(content, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in content.items())
    if not named or not content:
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or such a dictionary under 'model'.")
    return {name.removeprefix("net."): value for name, value in content.items()}


def read_tensors(path: str | Path, kind: str) -> Any:
    """Read a file of tensors and plain containers, and nothing that could run code.

    Args:
        path: an existing file.
        kind: what the file should be, for the error.

    Returns:
        What was saved, on the CPU.

    Raises:
        ValueError: if the file is anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable {kind}.") from error


def save_weights(source: str | Path, target: str | Path) -> str:
    """Turn a checkpoint into a weights file to ship: the network alone, flat, in half precision.

    Args:
        source: a weights file or checkpoint, see `read_state`.
        target: the file to write; it appears only when complete.

    Returns:
        The SHA-256 of the file written.

    Raises:
        ValueError: if the source holds no weights.
    """
    state = {f"net.{k}": v.half() if v.is_floating_point() else v for k, v in read_state(source).items()}
    save_atomically(state, target)
    return _sha256(Path(target))


def average_weights(sources: Sequence[str | Path], target: str | Path) -> None:
    """Average, number by number, the weights of trainings that went on from one and the same network.

    Such trainings mostly end in one valley of the loss, and what lies between them often generalizes better than each.
    The running statistics of batch normalization are averaged as well, which suits trainings that ended close together.

    Reference: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", ICML 2022, https://arxiv.org/abs/2203.05482.

    Args:
        sources: weights files or checkpoints, see `read_state`. What is not a floating point number, such as counters,
            is taken from the first.
        target: the file to write, flat; it appears only when complete.

    Raises:
        ValueError: if there are no sources, one cannot be read, or they are not of one network, `flow_rounds` included.
    """
    states = [read_state(source) for source in sources]
    if not states:
        raise ValueError("expected at least one weights file to average, got none.")
    first = states[0]
    shapes = {name: value.shape for name, value in first.items()}
    for source, state in zip(sources, states):
        arguments = (each.get(_ARGUMENTS_KEY, torch.empty(0)) for each in (first, state))
        if {name: value.shape for name, value in state.items()} != shapes or not torch.equal(*arguments):
            raise ValueError(f"expected weights of one network, got others in {source} than in {sources[0]}.")
    means = {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in first.items()
    }
    save_atomically({f"net.{name}": value for name, value in means.items()}, target)


def save_atomically(content: Any, path: str | Path) -> None:
    """Write a file of tensors so that a kill leaves the old file or the new one, never a part.

    Args:
        content: tensors and plain containers, as `torch.load(..., weights_only=True)` reads them.
        path: the file; its folder is made if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
