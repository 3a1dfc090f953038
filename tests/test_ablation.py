"""The networks that are compared for one difference between them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers_bundle import decathlon_folder


@pytest.fixture
def ablation(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "results"))
    monkeypatch.syspath_prepend(str(root / "bundle"))
    return importlib.import_module("ablation")


def test_networks_differ_in_what_their_names_say(ablation: ModuleType) -> None:
    attended, real, flow = {}, {}, {}
    for name in ablation.NETWORKS:
        parser = ablation.configuration(name, "images", seed=3)
        net = parser.get_parsed_content("network_def").net
        attended[name] = any("CoordinateAttention" in type(part).__name__ for part in net.modules())
        real[name], flow[name] = parser["dataset_dir"] == "images", getattr(net, "flow", None)
        assert parser["seed"] == 3 and parser["regularity_weight"] == parser["consistency_weight"] == 1.0
    assert [name for name in attended if attended[name]] == ["attention", "attention, synthetic anatomy"]
    assert [name for name in real if not real[name]] == ["attention, synthetic anatomy"]
    assert not any(flow.values())


def test_voxelmorph_takes_any_size(ablation: ModuleType) -> None:
    moving, fixed = torch.rand(2, 1, 1, 20, 17, 33)
    with torch.no_grad():
        assert ablation.FromVoxelMorph()(moving, fixed).shape == (1, 3, 20, 17, 33)


def test_an_unknown_network_is_told(ablation: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of attention; .* got 'other'"):
        ablation.main(str(tmp_path), only="other")


@pytest.mark.slow
def test_trains_once_and_compares(ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "NETWORKS", {name: ablation.NETWORKS[name] for name in ("attention", "VoxelMorph")})
    folder = decathlon_folder(tmp_path / "Task", count=10)
    options = {"minutes": 0.01, "num_pairs": 2, "split": "training", "output_dir": str(tmp_path / "out")}
    ablation.main(str(folder), **options)
    weights = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.pt")}
    assert len(weights) == 2
    ablation.main(str(folder), **options)
    assert all(path.read_bytes() == before for path, before in weights.items())
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert all(steps >= 1 for steps in report["training"]["steps"].values())
    assert set(report["summary"]) == {"0", "24"} and len(report["summary"]["24"]) == 4
