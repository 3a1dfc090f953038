"""The benchmark measures what it says, and fast paths are what they should be on other devices."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from equireg.batch import write_table
from equireg.networks import CARL, CoordinateAttention
from equireg.networks.attention import attend

SMALL = {"in_channels": 1, "feature_channels": 8, "nesting": "right", "factor": 4, "refinement_channels": (4, 8)}


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script, with a small network in place of the published one."""
    path = root / "bundle" / "docs" / "benchmarks" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PUBLISHED", SMALL)
    return module


@pytest.mark.parametrize(
    ("kind", "network", "shape"),
    [("forward", "equireg", "24x24x24"), ("forward", "equireg bfloat16", "24x24x24"), ("part", "half", "24x24x24")]
    + [("step", network, "40x32") for network in ("plain", "equireg", "equireg bfloat16")]
    + [("operation", name, shape) for name in ("warp", "compose", "invert") for shape in ("16x16x16", "24x16")]
    + [("operation", name, "16x16x16") for name in ("resize", "jacobian", "forward jacobian")],
)
def test_measurements(benchmark: ModuleType, capsys: pytest.CaptureFixture, kind: str, network: str, shape: str):
    benchmark.one(kind, network, shape)
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found["peak_mb"] >= found["start_mb"] > 50
    if (kind, network) == ("step", "equireg"):
        assert set(found["shares"]) == {"encoder", "attention", "U-Nets"} and found["shares"]["encoder"] > 0
    if kind == "operation":
        shares = found["shares"]
        assert 0 < shares["floor, ms"] < 1e3 and shares["least"] <= shares["ratio"] <= shares["most"]


@pytest.mark.slow
def test_registering_is_measured_as_a_whole(benchmark: ModuleType) -> None:
    found = benchmark.register(4, (64, 56, 40))
    assert found["seconds"] > found["shares"]["total"] > found["shares"]["network"] > 0 and found["peak_mb"] > 100


def test_operations_are_compared_with_floors(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    rows = []
    for run, ratio in enumerate((1.1, 1.5, 1.2)):
        shares = f"floor, ms 2.000; ratio {ratio}; least {ratio - 0.2:.2f}; most {ratio + 0.3:.2f}"
        rows.append({"kind": "operation", "network": "warp", "shape": "8x8", "seconds": "0.0025", "shares": shares})
        rows[-1] |= {"run": str(run), "peak_mb": "1", "start_mb": "1"}
    benchmark.floors(rows)
    assert "| warp | 8x8 | 2.5 | 2 | 1.20 (0.90 to 1.80) |" in capsys.readouterr().out


def test_rows_are_kept_and_compared(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "cases", lambda *_: [("start", "import equireg", (), run) for run in range(2)])
    path = tmp_path / "benchmark.csv"
    rows = []
    for run, (network, seconds, memory) in enumerate([("published", 8, 900), ("equireg", 2, 90), ("equireg", 4, 120)]):
        row = {"kind": "forward", "network": network, "shape": "96x96x96", "run": run, "seconds": seconds}
        rows.append({**row, "peak_mb": 100 + memory, "start_mb": 100})
    write_table(rows, path)
    for _ in range(2):
        benchmark.every(results=str(path), output_dir=str(tmp_path))
    assert len(list(csv.DictReader(path.open()))) == 5, "nothing is measured twice"
    assert "forward at 96^3, equireg / published: seconds x 0.375, memory x 0.117" in capsys.readouterr().out
    assert (tmp_path / "benchmark.png").exists()


def test_shipped_rows_are_the_documented_ones(benchmark: ModuleType, root: Path) -> None:
    """The page quotes the file."""
    folder = root / "bundle" / "docs" / "benchmarks"
    found = benchmark.medians(benchmark.read(folder / "data" / "benchmark.csv"))
    page = (folder / "README.md").read_text()
    for network in ("equireg", "published"):
        seconds, memory = found["forward", network, "96x96x96"]
        assert f"| {seconds:.3g} " in page and f"| {memory:.0f} |" in page


def test_half_of_the_content_costs_less_memory_and_work() -> None:
    """Attention in eager mode never sees background: the keys and queries it hands on are those of the content."""
    import equireg.networks.attention as module

    sizes: list[tuple[int, int]] = []
    original = module.streamed_attention

    def spy(queries, keys, values, allowed):
        sizes.append((queries.shape[1], keys.shape[1]))
        return original(queries, keys, values, allowed)

    net = CoordinateAttention(2, feature_channels=8, padding=1).eval()
    image = torch.zeros(1, 1, 40, 30)
    image[..., 5:13, 20:26] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "streamed_attention", spy)
        net(image, torch.ones(1, 1, 7, 9))
        net(torch.ones(1, 1, 7, 9), image)
    assert sizes == [(7 * 9, 10 * 8), (8 * 6, 9 * 11)]


@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_networks_answer_alike(dims: int) -> None:
    """`torch.compile` takes the network as a whole, on whole canvases; its default compiler needs a C++ one."""
    net = CARL(dims, feature_channels=8, refinement_channels=(4, 8)).eval()
    torch.manual_seed(0)
    moving, fixed = torch.zeros(2, 1, 1, *[20] * dims)
    moving[..., 4:15, 6:18] = torch.rand(moving[..., 4:15, 6:18].shape) + 0.1
    fixed[..., 3:13, 2:17] = torch.rand(fixed[..., 3:13, 2:17].shape) + 0.1
    with torch.no_grad():
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(moving, fixed), net(moving, fixed), rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_takes_a_kernel_of_linear_memory_on_a_gpu() -> None:
    """The kernel is fused for float32 and a mask, forward and backward: contiguous features of an aligned length."""
    from torch.profiler import ProfilerActivity, profile

    queries, keys = (torch.randn(1, n, 128, device="cuda", requires_grad=True) for n in (500, 700))
    allowed = torch.rand(1, 700, device="cuda") < 0.5
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        attend(queries, keys, torch.randn(1, 700, 3, device="cuda"), allowed).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_efficient_attention" in names and "aten::_softmax" not in names
