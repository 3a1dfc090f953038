"""Exports of the bundle: TorchScript and ONNX files that answer as the network they were made from, on any content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
import torch
from helpers_bundle import SIZES, files, inside_bundle, random_network
from helpers_networks import content, place

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:(?s).*parsing config_file")
CONTENT = {2: ((9, 11), (10, 8)), 3: ((7, 9, 8), (8, 7, 7))}
# Canvases and where the two contents lie on them: as large as the export's example, elsewhere, and other shapes.
CASES = {
    2: [
        ((16, 16), (0, 0), (5, 7)),
        ((16, 16), (6, 4), (1, 2)),
        ((23, 19), (11, 3), (6, 9)),
        ((33, 40), (20, 27), (1, 0)),
    ],
    3: [
        ((16, 16, 16), (0, 0, 0), (5, 7, 6)),
        ((16, 16, 16), (6, 4, 3), (1, 2, 0)),
        ((19, 17, 22), (9, 3, 11), (2, 8, 5)),
    ],
}
FLAT = [(1, 9, 8), (9, 8, 1)]
SINGLES = [(dims, *case) for dims, cases in CASES.items() for case in cases]


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


def pair(dims: int, shape: tuple[int, ...], *places: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    contents = [content(*size, seed=seed + k) for k, size in enumerate(CONTENT[dims])]
    return torch.cat([place(values, shape, at) for values, at in zip(contents, places)], dim=1)


def metadata(dims: int, folder: Path) -> str:
    """Return the metadata of the network of an export; that of the bundle describes the 3D one."""
    if dims == 3:
        return "configs/metadata.json"
    content = monai.bundle.ConfigParser.load_config_file("configs/metadata.json")
    formats = content["network_data_format"]
    for entry in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        entry["spatial_shape"] = entry["spatial_shape"][:dims]
    formats["outputs"]["pred"]["num_channels"] = dims + 1
    path = folder / "metadata.json"
    monai.bundle.ConfigParser.export_config_file(content, str(path))
    return str(path)


def export(kind: str, dims: int, folder: Path, **options: Any) -> tuple[torch.nn.Module, Path]:
    """Export a random tiny network as the command line does; return it and the file."""
    torch.manual_seed(0)
    network = random_network(dims)
    torch.save(network.state_dict(), folder / "model.pt")
    path = folder / f"model.{kind}"
    command = monai.bundle.onnx_export if kind == "onnx" else monai.bundle.ckpt_export
    command(
        "network_def",
        filepath=str(path),
        ckpt_file=str(folder / "model.pt"),
        meta_file=metadata(dims, folder),
        config_file=files("inference"),
        weights=str(folder / "model.pt"),
        **options,
    )
    return network, path


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Export scripted and traced networks once for all tests of this file."""
    made: dict[tuple[int, str], tuple[torch.nn.Module, torch.nn.Module]] = {}

    def get(dims: int, how: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        if (dims, how) not in made:
            folder = tmp_path_factory.mktemp(f"{how}{dims}")
            network, path = export("ts", dims, folder, use_trace=how == "trace")
            made[dims, how] = network, torch.jit.load(str(path))
        return made[dims, how]

    return get


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(("dims", "shape", "moving_at", "fixed_at"), SINGLES)
def test_torchscript_answers_as_the_network(
    dims: int, shape: tuple, moving_at: tuple, fixed_at: tuple, how: str, exported: Any
) -> None:
    network, module = exported(dims, how)
    image = pair(dims, shape, moving_at, fixed_at)
    with torch.no_grad():
        expected, answer = network(image), module(image)
    assert answer.shape == (1, dims + 1, *shape)
    assert (answer - expected).abs().max() < 1e-4
    assert expected[:, :dims].flatten(2).std(dim=2).min() > 0.05


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("shape", FLAT)
def test_torchscript_takes_axes_of_one_voxel(shape: tuple[int, ...], how: str, exported: Any) -> None:
    network, module = exported(3, how)
    image = content(*shape, channels=2)
    with torch.no_grad():
        assert (module(image) - network(image)).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("dims", SIZES)
def test_torchscript_takes_batches(dims: int, how: str, exported: Any) -> None:
    network, module = exported(dims, how)
    (shape, *one), (_, *two) = CASES[dims][:2]
    pairs = [pair(dims, shape, *one), pair(dims, shape, *two, seed=7)]
    with torch.no_grad():
        expected = torch.cat([network(image) for image in pairs])
        assert (module(torch.cat(pairs)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dims", "shape"),
    [(2, (23, 19)), pytest.param(3, (16, 16, 16), marks=pytest.mark.slow)],
)
def test_onnx_answers_as_the_network(dims: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """An ONNX file serves the one shape it was exported at, with any content on it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    names = {"input_names": ["image"], "output_names": ["pred"]}
    network, path = export("onnx", dims, tmp_path, input_shape=[1, 2, *shape], converter_kwargs=names)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for _, *places in CASES[dims][:2]:
        image = pair(dims, shape, *places)
        (answer,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            assert np.abs(answer - network(image).numpy()).max() < 1e-4
