"""Handlers for MONAI's training and evaluation engines that MONAI lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from .fields import warp
from .networks.pair import PairNetwork
from .weights import save_atomically

__all__ = ["AttentionMonitor", "BestWeights", "EpochCheckpoint", "StopOnNonFiniteLoss"]


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


class AttentionMonitor:
    """Report how well the attention stage registers on its own, as the metric `<name>` of an evaluator.

    The whole network can look well while the refinements do all the work; the attention alone tells.

    Args:
        network: a `PairNetwork` around a network with a method `attention_stage`, such as `CARL`.
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
        net: nn.Module = self.network.net
        for output in outputs:  # evaluators decollate their batches
            image = output["image"].unsqueeze(0)
            moving, fixed = image.chunk(2, dim=1)
            with torch.no_grad():
                moved = warp(moving, net.attention_stage().eval()(moving, fixed), padding="zeros")
            self._values.append(float(self.similarity(moved, fixed)))

    def _report(self, engine: Engine) -> None:
        engine.state.metrics[self.name] = sum(self._values) / max(len(self._values), 1)


class EpochCheckpoint:
    """Write everything needed to go on after each epoch, and go on from there when asked.

    MONAI's `CheckpointSaver` writes in place, so that a kill in that moment loses the old checkpoint and the new one;
    this one writes beside and renames.

    Args:
        path: the checkpoint file: a dictionary of the state dicts in `save_dict`, and the epochs and iterations done
            under "trainer".
        save_dict: name to an object with `state_dict` and `load_state_dict`; the network is called "model".
        resume: whether training goes on from the file.
    """

    def __init__(self, path: str | Path, save_dict: Mapping[str, Any], resume: bool = False) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after handlers whose effect the checkpoint should hold."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _load(self, engine: Engine) -> None:
        if not self.path.is_file():
            raise ValueError(f"nothing to resume from: {self.path} does not exist.")
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        done = content["trainer"]
        if done["epoch"] >= (engine.state.max_epochs or 0):
            raise ValueError(
                f"{self.path} has {done['epoch']} epochs done of the {engine.state.max_epochs} asked for: ask for more."
            )
        for name, target in self.save_dict.items():
            target.load_state_dict(content[name])
        engine.state.epoch, engine.state.iteration = done["epoch"], done["iteration"]

    def _save(self, engine: Engine) -> None:
        content: dict[str, Any] = {name: source.state_dict() for name, source in self.save_dict.items()}
        content["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        save_atomically(content, self.path)


class BestWeights:
    """Keep the weights of the best validation so far, as a flat state dict.

    Args:
        path: the weights file.
        network: whose state dict is written.
        metric: name of the evaluator's metric to compare.
        greater_is_better: whether a larger metric is a better one.
    """

    def __init__(self, path: str | Path, network: nn.Module, metric: str, greater_is_better: bool = True) -> None:
        self.path = Path(path)
        self.network = network
        self.metric = metric
        self.sign = 1.0 if greater_is_better else -1.0
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the weights if the evaluator's metric is the best so far."""
        score = self.sign * float(engine.state.metrics[self.metric])
        if score > self.best:
            self.best = score
            save_atomically(self.network.state_dict(), self.path)

    def state_dict(self) -> dict[str, float]:
        """Return the best score so far, for a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the best score of a checkpoint."""
        self.best = state["best"]
