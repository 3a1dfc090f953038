"""The scripts of the deck's page run, and find at a small size what the page says."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script as if it were run."""
    monkeypatch.syspath_prepend(str(root / "bundle" / "docs" / "deck"))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:  # names such as "common" are nobody else's business
        if getattr(sys.modules[name], "__file__", None) and "docs/deck" in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_definition(script, tmp_path: Path) -> None:
    errors = script("definition").main(shift=12, output_dir=str(tmp_path))
    assert errors["vessels"] < 1e-3
    assert errors["two images of zeros"] == pytest.approx((12**2 + 6**2) ** 0.5, rel=1e-5)
    assert (tmp_path / "deck_definition.png").stat().st_size < 200_000


def test_attention_inverts_a_function(script, tmp_path: Path) -> None:
    module = script("diffeomorphism")
    x = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    expected = torch.tensor([1, 0.8999, 0.8064, 0.7170, 0.4102, 0.1882, 0], dtype=torch.float64)
    torch.testing.assert_close(module.answer(x), expected, rtol=0, atol=1e-4)
    errors = module.main(sizes=(50, 200), draws=4, output_dir=str(tmp_path))
    assert errors["50"] < 0.007 and errors["200"] < 0.0018
    assert module.errors(200, 118.0, 1)[1].mean() < 0.0018


def test_a_displacement_network_follows_joint_shifts_only(script, tmp_path: Path) -> None:
    means = script("displacement").main(shifts=(0, 32), pairs=1, output_dir=str(tmp_path))
    assert means["both alike, [U,U]"][1] < 0.2 and means["moving alone"][1] > 20


@pytest.mark.slow
def test_two_steps(script, tmp_path: Path) -> None:
    errors = script("twostep").main(pairs=1, output_dir=str(tmp_path))
    assert errors["TwoStep{TwoStep{Xi, Psi}, Psi}"] < 0.01 and errors["Psi"] > 10
    assert errors["broken: TwoStep{Psi, Xi}"] > 1 and errors["broken: TwoStep{Psi, Psi}"] > 10


def test_landscape(script, tmp_path: Path) -> None:
    table = script("landscape").main(points=11, batches=2, batch_size=1, output_dir=str(tmp_path))
    assert all(value == pytest.approx(0, abs=1e-6) for name, value in table.items() if name.endswith("best t"))


def test_curves(script, tmp_path: Path) -> None:
    curves = script("curves").main(pairs=2, shifts=(0, 5), angles=(0, 90), output_dir=str(tmp_path))
    assert max(row["error_max"] for row in curves["through the inferer"]) < 1e-3
    assert (tmp_path / "equivariance_vessels.csv").exists() and (tmp_path / "equivariance_vessels.png").exists()


def test_variants_of_the_retina_experiment(script) -> None:
    module = script("retina")
    image = torch.zeros(1, module.INNER, module.INNER)
    image[:, 10:40, 12:44] = torch.rand(1, 30, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    made = {variant: module.pairs([{"image": image}], variant, 0, 1)[0] for variant in module.VARIANTS}
    height = module.INNER + module.GAP
    assert {item["image"].shape for item in made.values()} == {(2, height, module.INNER)}
    base, shifted, scaled = (made[v] for v in module.VARIANTS)
    assert torch.equal(shifted["moving"][:, module.GAP :], base["moving"][:, : module.INNER])
    assert torch.equal(shifted["fixed"], base["fixed"]) and torch.equal(scaled["moving"], shifted["moving"])
    sizes = [(item["fixed"] > 0).any(dim=2).sum().item() for item in (base, scaled)]
    assert sizes[1] / sizes[0] == pytest.approx(module.ZOOM, abs=0.06)


@pytest.mark.slow
def test_retina_trains_and_goes_on(script, shared_data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    module = script("retina")
    monkeypatch.setattr(module, "EPOCHS", 1)
    monkeypatch.setattr(module, "STEPS", 2)
    options = {"variants": ("shift",), "warps": 1, "results": str(tmp_path / "retina.csv"), "weights_dir": ""}
    options["output_dir"] = str(tmp_path)
    module.main(str(shared_data), seeds=1, networks=("attention only",), **options)
    module.main(str(shared_data), seeds=1, networks=("attention only", "U-Net only"), **options)
    rows = module.read(tmp_path / "retina.csv")
    assert [(row["network"], row["test"]) for row in rows] == [
        (name, test) for name in ("attention only", "U-Net only") for test in module.VARIANTS
    ]
    assert rows[0]["dice"] == rows[1]["dice"], "attention alone cannot tell a shift"


def test_undoing_turns_around_a_network(script) -> None:
    module = script("rotation")
    generator = torch.Generator().manual_seed(0)
    there, back = [module.turn_by(33), module.turn_by(250)], [module.turn_by(0), module.turn_by(100)]
    slope, offset = torch.eye(2) + 0.05 * torch.randn(2, 2, generator=generator), torch.tensor([0.5, -1.0])
    grid = module.identity_grid(module.OLD)

    def follow(points: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bj...->bi...", slope, points - 27.5) + 27.5 + offset.reshape(1, 2, 1, 1)

    new = module.identity_grid(module.NEW)
    answer = torch.cat([a.to_new(follow(b.to_old(new))) for a, b in zip(there, back)]) - new
    inside = torch.linalg.vector_norm(grid - 27.5, dim=1) < module.RADIUS
    error = (module.upright(answer, there, back) - (follow(grid) - grid)).abs().amax(dim=1)
    assert error[inside.expand(2, -1, -1)].max() < 1e-3 < error.max()


def test_rotation_trains_scores_and_goes_on(script, tmp_path: Path, monkeypatch) -> None:
    retina, module = script("retina"), script("rotation")
    image = torch.zeros(1, retina.INNER, retina.INNER)
    image[:, 12:44, 10:38] = torch.rand(1, 32, 28, generator=torch.Generator().manual_seed(0)) + 0.1
    monkeypatch.setattr(retina, "eyes", lambda *_: [{"image": image}])
    monkeypatch.setattr(retina, "EPOCHS", 1)
    monkeypatch.setattr(retina, "STEPS", 1)
    monkeypatch.setattr(retina, "BATCH", 2)
    options = {"warps": 1, "features": 8, "results": str(tmp_path / "rotation.csv"), "weights_dir": ""}
    names = ("attention only", "attention only, turns", "hybrid, turns")
    for networks in (names[:1], names):
        module.main("", networks=networks, angles=(0, 90), output_dir=str(tmp_path), **options)
    rows = retina.read(tmp_path / "rotation.csv")
    assert [row["network"] for row in rows] == [name for name in names for _ in range(2)]
    plain, turns, hybrid = ([float(row["dice"]) for row in rows if row["network"] == name] for name in names)
    assert turns[0] == turns[1] and plain[0] != plain[1], "features averaged over quarter turns follow them"
    assert hybrid[0] == hybrid[1], "what the attention follows, the U-Nets do not see"
    assert (tmp_path / "deck_rotation.png").stat().st_size < 200_000


def test_limits(script, tmp_path: Path) -> None:
    module = script("limits")
    torch.manual_seed(0)
    module.main(pairs=2, output_dir=str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "limits_vessels.csv").open()))
    errors = {(row["kind"], float(row["amount"]), row["pair"]): float(row["error_mean"]) for row in rows}
    assert errors["noise", 0.0, "0"] < 1e-3 < errors["noise", 0.1, "0"] and errors["cut", 0.0, "1"] == 0
    assert errors["cut", 0.4, "1"] > errors["cut", 0.05, "1"] > 0
    assert (tmp_path / "limits_vessels.png").stat().st_size < 200_000
