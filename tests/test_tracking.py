"""What training reports to: TensorBoard, MLflow, or nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_bundle import SIZES, TINY_TRAINING, inside_bundle, run

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")
VALIDATION = {"val_similarity", "val_regularity", "val_folding", "val_attention_similarity", "val_mean_dice"}


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


def train(out: Path, **options: bool) -> set[str]:
    """Train two epochs of two steps; return the names of what is left."""
    run("training", "train", **{**TINY_TRAINING, **SIZES[2], "epochs": 2, "output_dir": str(out), **options})
    return {path.name.split(".")[0] for path in out.iterdir()}


def test_tensorboard_is_on_and_off(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "off", tensorboard=False) == {"checkpoint", "model"}
    assert train(tmp_path / "on", tensorboard=True) == {"checkpoint", "model", "events"}


def test_mlflow_keeps_losses_rates_and_metrics_in_one_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert {"checkpoint", "model", "mlflow"} <= train(tmp_path / "out", mlflow=True)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    experiment = client.get_experiment_by_name("equireg")
    (done,) = client.search_runs([experiment.experiment_id])
    assert done.info.status == "FINISHED" and done.info.run_name == str(tmp_path / "out")
    assert set(done.data.metrics) >= VALIDATION | {"train_loss", "mean_train_loss"}
    lengths = {name: len(client.get_metric_history(done.info.run_id, name)) for name in (*VALIDATION, "train_loss")}
    assert lengths.pop("train_loss") == 4 and set(lengths.values()) == {2}
    assert done.data.params["max_epochs"] == "2"
