"""Handlers on MONAI's engines: stopping, checkpoints that survive a kill, the monitor of the attention stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_networks import SMALL, content, place, randomized
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn

from equireg.fields import warp
from equireg.handlers import AttentionMonitor, ClipGradients, EpochCheckpoint, StopOnNonFiniteLoss
from equireg.networks import CARL, PairNetwork

METRIC = "score"


class Training:
    """A small deterministic training: two parameters layers, Adam with momentum, a rate that changes every epoch."""

    def __init__(self, folder: Path, epochs: int, resume: bool = False, scores: list[float] | None = None, **options):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.7)
        data = [{"image": content(5, 5, seed=k)[0], "label": content(3, 3, seed=9 + k)[0]} for k in range(4)]
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=epochs,
            train_data_loader=DataLoader(data, batch_size=2),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            decollate=False,
        )
        self.epochs: list[int] = []
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: self.epochs.append(e.state.epoch))
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: self.scheduler.step())
        self.evaluator = Engine(lambda engine, batch: None)
        if scores is not None:
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._validate, scores)
        save = {"model": self.network, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        if scores is not None:
            options = {"evaluator": self.evaluator, "metric": METRIC, **options}
        self.checkpoint = EpochCheckpoint(folder, save, resume=resume, **options)
        self.checkpoint.attach(self.trainer)

    def _validate(self, engine: Engine, scores: list[float]) -> None:
        score = scores[engine.state.epoch - 1]
        if score is not None:  # an epoch without validation
            self.evaluator.state.metrics[METRIC] = score

    def run(self) -> Training:
        self.trainer.run()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.network.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- stopping


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_before_the_weights(bad: float, tmp_path: Path) -> None:
    training = Training(tmp_path, epochs=3)
    StopOnNonFiniteLoss().attach(training.trainer)
    snapshots: list[dict[str, torch.Tensor]] = []
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: snapshots.append(training.weights()))
    mean_squares = nn.MSELoss()
    training.trainer.loss_function = lambda pred, label: mean_squares(pred, label) * (bad if len(snapshots) == 3 else 1)
    with pytest.raises(ValueError, match=rf"the loss became {bad} in iteration 4 \(epoch 2\); training stopped"):
        training.run()
    assert len(snapshots) == 3
    after = training.weights()
    # The forward pass has moved the running statistics, but no step was taken.
    assert all(torch.equal(after[name], snapshots[-1][name]) for name, _ in training.network.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["epoch"] == 1


def test_finite_losses_pass(tmp_path: Path) -> None:
    training = Training(tmp_path, epochs=2)
    StopOnNonFiniteLoss().attach(training.trainer)
    assert training.run().epochs == [1, 2]


# ---- clipping


def gradients(folder: Path, max_norm: float | None, wild: int) -> list[torch.Tensor]:
    """Train for six steps, the loss of one of them a million times as large; return the gradient of each step."""
    training, steps = Training(folder, epochs=3), []
    training.optimizer.param_groups[0]["lr"] = 0.0  # all runs see the same weights
    if max_norm is not None:
        ClipGradients(training.network.parameters(), max_norm).attach(training.trainer)

    def keep(engine: Engine) -> None:
        steps.append(torch.cat([value.grad.flatten() for value in training.network.parameters()]))

    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, keep)
    mean_squares = nn.MSELoss()
    training.trainer.loss_function = lambda pred, label: mean_squares(pred, label) * (1e6 if len(steps) == wild else 1)
    training.run()
    return steps


def test_only_gradients_that_are_too_long_are_clipped(tmp_path: Path) -> None:
    plain = gradients(tmp_path / "plain", None, wild=3)
    limit = 2 * max(step.norm().item() for number, step in enumerate(plain) if number != 3)
    clipped = gradients(tmp_path / "clipped", limit, wild=3)
    assert all(torch.equal(clipped[number], plain[number]) for number in range(6) if number != 3)
    assert plain[3].norm() > 1e4 * limit and clipped[3].norm().item() == pytest.approx(limit, rel=1e-4)
    assert torch.allclose(clipped[3] / limit, plain[3] / plain[3].norm(), atol=1e-5)


def test_gradients_of_a_scaled_loss_are_clipped_by_their_own_size(tmp_path: Path) -> None:
    training = Training(tmp_path, epochs=1)
    parameters = list(training.network.parameters())
    training.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    training.trainer.scaler.scale(torch.stack([value.sum() for value in parameters]).sum()).backward()
    norm = sum(value.numel() for value in parameters) ** 0.5  # every slope is 1
    assert parameters[0].grad.flatten()[0] == 1024
    ClipGradients(parameters, max_norm=2 * norm)(training.trainer)
    assert all(torch.equal(value.grad, torch.ones_like(value)) for value in parameters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_not_reach_the_weights(bad: float) -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([1.0, bad]), torch.ones(1)
    with pytest.raises(RuntimeError, match="non-finite"):
        ClipGradients(weights, max_norm=1.0)(Engine(lambda engine, batch: None))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_clips_everything_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive, got"):
        ClipGradients([], max_norm)


# ---- checkpoints


@pytest.mark.parametrize("done", [1, 3])
def test_resumed_training_is_the_uninterrupted_one(done: int, tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", epochs=5).run()
    Training(tmp_path / "part", epochs=done).run()
    resumed = Training(tmp_path / "part", epochs=5, resume=True)
    assert not same(resumed.weights(), whole.weights())
    resumed.run()
    assert resumed.epochs == list(range(done + 1, 6))
    assert resumed.trainer.state.iteration == whole.trainer.state.iteration == 10
    assert same(resumed.weights(), whole.weights())
    assert (
        resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**5)
    )


def test_without_resume_training_starts_anew(tmp_path: Path) -> None:
    Training(tmp_path, epochs=2).run()
    assert Training(tmp_path, epochs=3).run().epochs == [1, 2, 3]


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training(tmp_path, epochs=2).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    write: Callable = torch.save

    def killed(content: object, path: Path) -> None:
        write(content, path)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            Training(tmp_path, epochs=3, resume=True).run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert Training(tmp_path, epochs=3, resume=True).run().epochs == [3]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume from: .*checkpoint.pt does not exist"):
        Training(tmp_path, epochs=2, resume=True).run()


def test_no_epoch_left(tmp_path: Path) -> None:
    Training(tmp_path, epochs=2).run()
    with pytest.raises(ValueError, match=r"checkpoint.pt has 2 epochs done of the 2 asked for: ask for more"):
        Training(tmp_path, epochs=2, resume=True).run()


# ---- best weights


@pytest.mark.parametrize(("greater", "best"), [(True, 2), (False, 4)])
def test_best_weights_are_those_of_the_best_validation(greater: bool, best: int, tmp_path: Path) -> None:
    training = Training(tmp_path, epochs=5, scores=[0.5, 0.9, 0.9, 0.1, 0.2], greater_is_better=greater)
    after: list[dict[str, torch.Tensor]] = []
    training.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: after.append(training.weights()))
    training.run()
    kept = torch.load(tmp_path / "model.pt", weights_only=True)
    assert [same(kept, weights) for weights in after] == [epoch == best for epoch in range(1, 6)]


def test_best_score_survives_a_resume(tmp_path: Path) -> None:
    scores = [0.3, 0.8, 0.6, 0.9]
    best = Training(tmp_path, epochs=2, scores=scores).run().weights()
    Training(tmp_path, epochs=3, scores=scores, resume=True).run()
    assert same(torch.load(tmp_path / "model.pt", weights_only=True), best)
    better = Training(tmp_path, epochs=4, scores=scores, resume=True).run().weights()
    assert same(torch.load(tmp_path / "model.pt", weights_only=True), better)


@pytest.mark.parametrize("scores", [[None, None], [float("nan"), float("nan")]])
def test_no_score_no_best_weights(scores: list, tmp_path: Path) -> None:
    Training(tmp_path, epochs=2, scores=scores).run()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_evaluator_without_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the name of a metric along with an evaluator"):
        EpochCheckpoint(tmp_path, {}, evaluator=Engine(lambda engine, batch: None))


# ---- attention monitor


def test_a_network_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    trainer = Engine(lambda engine, batch: None)
    EpochCheckpoint(tmp_path, {"model": net}).attach(trainer)
    trainer.run([0], max_epochs=1)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    nn.init.constant_(net.weight, float("inf"))
    again = Engine(lambda engine, batch: None)
    EpochCheckpoint(tmp_path, {"model": net}).attach(again)
    with pytest.raises(ValueError, match="diverged in epoch 1: weight is not finite"):
        again.run([0], max_epochs=1)
    assert (tmp_path / "checkpoint_previous.pt").read_bytes() == good and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "foreign"])
def test_resuming_from_a_file_that_is_no_checkpoint(content: bytes | str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save({"model": nn.Linear(3, 3).state_dict(), "trainer": {"epoch": 0}}, tmp_path / "checkpoint.pt")
    trainer = Engine(lambda engine, batch: None)
    EpochCheckpoint(tmp_path, {"model": nn.Linear(2, 2)}, resume=True).attach(trainer)
    with pytest.raises(ValueError, match="not a readable checkpoint|checkpoint of another training"):
        trainer.run([0], max_epochs=2)


@pytest.mark.parametrize("nesting", ["deck", "left"])
@pytest.mark.parametrize("assembled", [True, False])
def test_attention_monitor_measures_the_first_step_alone(nesting: str, assembled: bool) -> None:
    net = randomized(CARL(2, nesting=nesting, **SMALL))
    network = PairNetwork(net if assembled else net.steps)
    images = [
        torch.cat([place(content(7, 9, seed=k + s), (16, 14), (k, 2 + k)) for s in (0, 50)], dim=1)[0] for k in range(3)
    ]

    def similarity(moved: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        assert moved.shape == fixed.shape == (1, 1, 16, 14)
        return (moved - fixed).abs().mean()

    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader([{"image": image, "label": image} for image in images], batch_size=2),
        network=network,
    )
    AttentionMonitor(network, similarity, name="alone").attach(evaluator)
    expected, whole = 0.0, 0.0
    with torch.no_grad():
        for image in images:
            moving, fixed = image[None, :1], image[None, 1:]
            first = warp(moving, net.attention_stage()(moving, fixed), padding="zeros")
            expected += float(similarity(first, fixed)) / 3
            whole += float(similarity(warp(moving, net(moving, fixed), padding="zeros"), fixed)) / 3
    for _ in range(2):  # each run starts to count anew
        evaluator.run()
        assert evaluator.state.metrics["alone"] == pytest.approx(expected, abs=1e-6)
    assert abs(whole - expected) > 1e-3
