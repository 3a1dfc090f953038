"""Handlers for MONAI's training and evaluation engines that MONAI lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.networks.utils import eval_mode
from monai.transforms import Randomizable
from torch import nn

from .fields import warp
from .losses import RegistrationLoss
from .networks.combinators import first_step
from .networks.pair import PairNetwork
from .weights import read_tensors, save_atomically

__all__ = [
    "AttentionMonitor",
    "ClipGradients",
    "EpochCheckpoint",
    "EpochSeed",
    "RegularityWarmup",
    "StopOnNonFiniteLoss",
    "cosine_decay",
]


def cosine_decay(epoch: int, epochs: int) -> float:
    """Return what the learning rate is multiplied by in an epoch, for `torch.optim.lr_scheduler.LambdaLR`.

    Unlike with torch's `CosineAnnealingLR`, whose state holds the length of the run, a run that is resumed with more
    epochs goes on along the longer curve.

    Args:
        epoch: epochs done.
        epochs: epochs of the whole run.

    Returns:
        From 1 at the start along half a cosine to 0 at the end.

    Example:
        >>> [round(cosine_decay(epoch, 4), 3) for epoch in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(epoch, epochs) / epochs))


class StopOnNonFiniteLoss:
    """Stop training with an error as soon as the loss is not finite, before it reaches the weights.

    Checkpoints of earlier epochs stay as they are.

    Example:
        >>> StopOnNonFiniteLoss()(Engine(lambda engine, batch: None))
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a `SupervisedTrainer`, to run between the loss and its gradient."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check the loss of the current iteration.

        Raises:
            ValueError: if it is NaN or infinite.
        """
        output: Any = engine.state.output
        if output is not None and not torch.isfinite(output["loss"]).all():
            raise ValueError(
                f"the loss became {output['loss'].item()} in iteration {engine.state.iteration} (epoch "
                f"{engine.state.epoch}); training stopped, the last checkpoint is the one before it."
            )


class ClipGradients:
    """Scale the gradient of each step down to a norm that it must not exceed.

    One pair that is answered wildly has a gradient hundreds of times as long as others. Adam divides by the root of a
    running mean of squares, which remembers it for thousands of steps, in which training all but stands still.

    Where the trainer scales its loss (`amp`), gradients are brought back to their size first, which torch allows once a
    step: not together with an accumulation of gradients.

    Args:
        parameters: of the network that is trained.
        max_norm: the norm, over all parameters together.

    Raises:
        ValueError: if `max_norm` is not positive.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([30.0, 40.0])
        >>> ClipGradients([weight], max_norm=5.0)(Engine(lambda engine, batch: None))
        >>> weight.grad
        tensor([3.0000, 4.0000])
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}.")
        self.parameters = list(parameters)
        self.max_norm = float(max_norm)

    def attach(self, engine: Engine) -> None:
        """Attach to a `SupervisedTrainer`, to run between the gradient and the optimizer's step."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Scale the gradients, where they are too long together.

        Raises:
            RuntimeError: if their norm is not finite; a scaler of the loss would skip the step instead.
        """
        trainer: Any = engine
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm, error_if_nonfinite=scaler is None)


class AttentionMonitor:
    """Report how well the first step registers on its own, as a metric of an evaluator.

    The whole network can look well while the refinements do all the work; the attention alone tells.

    Args:
        network: a `PairNetwork` around `CARL` or a nest of `TwoStep` and `Downsample`.
        similarity: called `similarity(moved, fixed)`, returns a scalar.
        name: name of the metric: the mean of the similarity over the evaluated pairs.
    """

    def __init__(
        self,
        network: PairNetwork,
        similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        name: str = "attention_similarity",
    ) -> None:
        self.network = network
        self.similarity = similarity
        self.name = name
        self._values: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a `SupervisedEvaluator`; attach before handlers that write metrics out."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self._values = []

    def _measure(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        stage = first_step(self.network.net)
        for output in outputs:  # evaluators decollate their batches
            image = output["image"].unsqueeze(0)
            moving, fixed = image.chunk(2, dim=1)
            with eval_mode(self.network):  # whose modules are the stage's
                moved = warp(moving, stage(moving, fixed), padding="zeros")
            self._values.append(float(self.similarity(moved, fixed)))

    def _report(self, engine: Engine) -> None:
        total, count = (idist.all_reduce(value) for value in (sum(self._values), len(self._values)))
        engine.state.metrics[self.name] = total / max(count, 1)


class EpochSeed:
    """Seed torch and the random transforms anew at the start of each epoch, from the epoch's number.

    A resumed training then augments and draws noise as an uninterrupted one does, without random states in its
    checkpoint. Workers that outlive an epoch keep their own random transforms. Where several processes train together,
    each augments in its own way, and all draw the same noise, of which one draw serves a whole batch.

    Args:
        seed: seed of the training.
        transform: random transforms, as one `monai.transforms.Compose`.
    """

    def __init__(self, seed: int, transform: Randomizable) -> None:
        self.seed = seed
        self.transform = transform

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed for the epoch that starts."""
        torch.manual_seed(self._drawn(engine.state.epoch))
        self.transform.set_random_state(seed=self._drawn(engine.state.epoch, idist.get_rank()))

    def _drawn(self, *numbers: int) -> int:
        return int(np.random.SeedSequence([self.seed, *numbers]).generate_state(1)[0])


class EpochCheckpoint:
    """Keep what training has reached after each epoch, keep the best weights apart, and go on from there when asked.

    `checkpoint.pt` holds everything needed to go on; `model.pt` the flat state dict of the best validation so far.
    MONAI's `CheckpointSaver` writes in place, so that a kill in that moment loses the old file and the new one; this
    handler writes beside and renames. A new training sets the files of an earlier one aside: `checkpoint_previous.pt`,
    `model_previous.pt`. Where several processes train together, all read and the first one writes.

    Args:
        output_dir: folder of the two files.
        save_dict: name to an object with `state_dict` and `load_state_dict`; the network is called "model". The
            checkpoint holds their state dicts, and the epochs and iterations done and the best score under "trainer".
        evaluator: the engine that validates, if the best weights are to be kept.
        metric: name of the evaluator's metric that says what is best.
        greater_is_better: whether a larger metric is a better one.
        resume: whether training goes on from the checkpoint.

    Raises:
        ValueError: if there is an evaluator without a metric; when training starts, if there is nothing to resume from
            or no epoch left to train; when an epoch ends, if the network is not finite.
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_dict: Mapping[str, Any],
        evaluator: Engine | None = None,
        metric: str | None = None,
        greater_is_better: bool = True,
        resume: bool = False,
    ) -> None:
        if evaluator is not None and metric is None:
            raise ValueError("EpochCheckpoint expects the name of a metric along with an evaluator, got none.")
        self.path = Path(output_dir) / "checkpoint.pt"
        self.best_path = Path(output_dir) / "model.pt"
        self.save_dict = dict(save_dict)
        self.evaluator = evaluator
        self.metric = metric or ""
        self.sign = 1.0 if greater_is_better else -1.0
        self.best = float("-inf")
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handler that validates and others whose effect the checkpoint should hold."""
        engine.add_event_handler(Events.STARTED, self._load if self.resume else self._set_aside)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _load(self, engine: Engine) -> None:
        content = self._read()
        done = content["trainer"]
        if done["epoch"] >= (engine.state.max_epochs or 0):
            raise ValueError(
                f"{self.path} has {done['epoch']} epochs done of the {engine.state.max_epochs} asked for: ask for more."
            )
        try:
            for name, target in self.save_dict.items():
                target.load_state_dict(content[name])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is the checkpoint of another training: {error}") from error
        engine.state.epoch, engine.state.iteration, self.best = done["epoch"], done["iteration"], done["best"]

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            raise ValueError(f"nothing to resume from: {self.path} does not exist.")
        content = read_tensors(self.path, "checkpoint")
        missing = {"trainer", *self.save_dict} - set(content)
        if missing:
            raise ValueError(
                f"{self.path} is not a checkpoint of this training: it lacks {', '.join(sorted(missing))}."
            )
        return content

    @idist.one_rank_only()
    def _set_aside(self, engine: Engine) -> None:
        """Rename what an earlier training left in the folder, so that a forgotten `resume` costs nothing."""
        for path in (self.path, self.best_path):
            if path.exists():
                path.replace(path.with_stem(f"{path.stem}_previous"))

    def _save(self, engine: Engine) -> None:
        state = self.save_dict["model"].state_dict()
        broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(
                f"training diverged in epoch {engine.state.epoch}: {broken[0]} is not finite (with {len(broken) - 1} "
                "more); the checkpoint stays the one before."
            )
        self._write(engine, state)

    @idist.one_rank_only()
    def _write(self, engine: Engine, state: Mapping[str, torch.Tensor]) -> None:
        # Before the first validation the evaluator has no metrics, and between two of them those of the last one.
        score = None if self.evaluator is None else self.evaluator.state.metrics.get(self.metric)
        if score is not None and self.sign * float(score) > self.best:
            self.best = self.sign * float(score)
            save_atomically(state, self.best_path)
        content: dict[str, Any] = {name: source.state_dict() for name, source in self.save_dict.items()}
        content["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration, "best": self.best}
        save_atomically(content, self.path)


class RegularityWarmup:
    """Train on regularity alone for the first epochs, and on consistency alone afterwards.

    Coordinate attention does not start to train from scratch under GradICON, but does under diffusion, which in turn
    would hold back large deformations later. The handler sets the loss's two weights at the start of every epoch from
    the epoch's number, so that a resumed run goes on with the right ones.

    Args:
        loss: a `RegistrationLoss` with both terms; its weights at this time are those that are switched on.
        warmup_epochs: number of epochs with regularity; 0 for none.

    Raises:
        ValueError: if the loss lacks a term or its weight, or `warmup_epochs` is negative.

    Example:
        >>> from equireg.losses import DiffusionLoss, GradICONLoss, LocalCorrelationLoss, RegistrationLoss
        >>> loss = RegistrationLoss(LocalCorrelationLoss(), DiffusionLoss(), 1.5, GradICONLoss(), 2.5)
        >>> trainer = Engine(lambda engine, batch: (loss.regularity_weight, loss.consistency_weight))
        >>> RegularityWarmup(loss, warmup_epochs=1).attach(trainer)
        >>> trainer.run([0], max_epochs=1).output, trainer.run([0], max_epochs=2).output
        ((1.5, 0.0), (0.0, 2.5))
    """

    def __init__(self, loss: RegistrationLoss, warmup_epochs: int) -> None:
        weights = (loss.regularity_weight, loss.consistency_weight)
        if loss.regularity is None or loss.consistency is None or 0 in weights:
            raise ValueError(
                "RegularityWarmup expects a loss with regularity, consistency and weights other than 0, "
                f"got {loss.regularity}, {loss.consistency} and weights {weights}."
            )
        if warmup_epochs < 0:
            raise ValueError(f"RegularityWarmup expects warmup_epochs of at least 0, got {warmup_epochs}.")
        self.loss = loss
        self.warmup_epochs = warmup_epochs
        self._weights = weights

    def attach(self, engine: Engine) -> None:
        """Let a trainer call this handler at the start of each epoch."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weights for the engine's current epoch, counted from 1."""
        warm = engine.state.epoch <= self.warmup_epochs
        self.loss.regularity_weight = self._weights[0] if warm else 0.0
        self.loss.consistency_weight = 0.0 if warm else self._weights[1]
