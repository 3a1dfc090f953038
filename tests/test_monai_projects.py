"""The examples for other MONAI projects: our network in MONAI's loop, and MONAI's networks behind our attention."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

from equireg.networks.combinators import first_step

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:monai.networks.blocks.Warp")


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports an example as if it were run."""
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "hosts"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("composed", "tutorial_loop"):
        sys.modules.pop(name, None)


def test_carl_learns_in_the_loop_of_the_tutorials(script) -> None:
    module = script("tutorial_loop")
    loss = LocalNormalizedCrossCorrelationLoss(2, kernel_size=7, kernel_type="gaussian")
    unregistered = [loss(batch["moving"], batch["fixed"]).item() for batch in module.pairs(2)]
    history = module.main(spatial_dims=2, epochs=6)
    assert len(history) == 6 and history[-1] < history[0] - 0.1
    assert history[-1] < 2 * sum(unregistered) / len(unregistered) < 0, "it should gain on doing nothing"


def test_carl_learns_in_the_loop_in_3d(script) -> None:
    history = script("tutorial_loop").main(spatial_dims=3, epochs=2)
    assert history[1] < history[0] - 0.02


def test_networks_of_monai_behind_attention_follow_every_move(script) -> None:
    module = script("composed")
    found = module.main(spatial_dims=2, epochs=3)
    assert all(row["last"] < row["first"] for row in found.values())
    assert found["attention, then both"]["error"] < 1e-3
    assert max(row["cropped"] for row in found.values()) < 1e-3
    assert min(found[name]["error"] for name in ("VoxelMorph", "RegUNet")) > 1, "the measure should tell"


def test_networks_of_monai_take_part(script) -> None:
    """Random refinements change the answer, and it still follows: their part is not trivially small."""
    module = script("composed")
    network = module.composed(2).eval()
    with torch.no_grad():
        for parameter in network.second.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for parameter in network.first.second.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    moving, fixed = (next(iter(module.pairs(2)))[name][..., :45, :43] for name in ("moving", "fixed"))
    with torch.no_grad():
        change = network(moving, fixed) - first_step(network)(moving, fixed)
        middle = network.first(moving, fixed) - first_step(network)(moving, fixed)
    assert change.abs().max() > 0.5 and middle.abs().max() > 0.5
    errors = module.equivariance_error(network, moving, fixed, kinds=["translation"], sides=["moving"])
    assert max(errors.values()) < 1e-3
