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
    attended, real, flow, windows = {}, {}, {}, set()
    for name in ablation.NETWORKS:
        parser = ablation.configuration(name, "images", seed=3)
        net = parser.get_parsed_content("network_def").net
        attended[name] = any("CoordinateAttention" in type(part).__name__ for part in net.modules())
        real[name], flow[name] = parser["dataset_dir"] == "images", getattr(net, "flow", None)
        assert parser["seed"] == 3 and parser["regularity_weight"] == parser["consistency_weight"] == 1.0
        windows.add((parser["window_sigma"], parser["learning_rate"]))
        same = ablation.configuration(name, "images", seed=3).get_parsed_content("network_def").net.state_dict()
        assert all(torch.equal(value, same[key]) for key, value in net.state_dict().items()), "one seed"
        assert any("VoxelMorph" in type(part).__name__ for part in net.modules()) == (name == "VoxelMorph")
    assert [name for name in attended if attended[name]] == ["attention", "attention, synthetic anatomy"]
    assert [name for name in real if not real[name]] == ["attention, synthetic anatomy"]
    assert not any(flow.values()) and len(windows) == 1


def test_voxelmorph_takes_any_size(ablation: ModuleType) -> None:
    moving, fixed, net = torch.rand(1, 1, 44, 17, 20), torch.rand(1, 1, 20, 17, 33), ablation.FromVoxelMorph()
    with torch.no_grad():
        assert net(moving, fixed).shape == (1, 3, 20, 17, 33)
        assert net(fixed, moving).shape == (1, 3, 44, 17, 20)


def test_images_are_seen_center_on_center(ablation: ModuleType) -> None:
    pair = {"moving": torch.ones(1, 4, 6, 5), "fixed": torch.ones(1, 8, 2, 5), "other": torch.ones(1, 1, 1, 1)}
    fitted = ablation.centered(pair)
    assert fitted["moving"].shape == fitted["fixed"].shape == (1, 8, 6, 5) and fitted["other"] is pair["other"]
    assert fitted["moving"][0, 2:6].all() and not fitted["moving"][0, :2].any()
    assert fitted["fixed"][0, :, 2:4].all() and not fitted["fixed"][0, :, :2].any()


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
    with pytest.raises(ValueError, match="was trained with .*'seed': 0.*, not with .*'seed': 1"):
        ablation.main(str(folder), **options, seed=1)
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert all(steps >= 1 for steps in report["training"]["steps"].values())
    assert set(report["summary"]) == {"0", "24"} and len(report["summary"]["24"]) == 4
