"""Swap averaged weights into the model, with their own statistics of batch normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hf_accel import weights
from hf_accel.engine import batch_norm
from hf_accel.engine.meter import Meter
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView
from hf_accel.stream.indexed import StepStream


class AveragedWeights:
    """Swap averages for the weights during evaluation and saving, and at the end of training.

    Args:
        stream: Return the stream of the run, or a new one, for the statistics of batch normalization.
        micro_batch_size: Return the current size.
    """

    def __init__(
        self,
        host: TrainerView,
        roster: Roster,
        meter: Meter,
        *,
        stream: Callable[[], StepStream],
        micro_batch_size: Callable[[], int],
    ):
        self.host, self.roster, self.meter = host, roster, meter
        self.stream, self.micro_batch_size = stream, micro_batch_size
        self.ended = False
        """True once the model holds the weights that ``train`` returns."""
        self._swapped = False

    def averages(self) -> dict[str, Tensor] | None:
        """Return this rank's part of the averages and their statistics, or None before there are any."""
        owner = self.roster.owner("averaging")
        averages = owner.averaging() if owner is not None else None
        return averages if averages is None else averages | self._statistics(averages)

    def _statistics(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        host = self.host
        if not batch_norm.layers(host.model):
            return {}
        model: Any = host.model_wrapped if host.is_deepspeed_enabled else host.model
        inputs = batch_norm.micro_batches(self.stream(), self.micro_batch_size())
        with self.meter.stopwatch.charge("batch norm"):
            return batch_norm.statistics(host.model, averages, inputs, lambda batch: self._predict(model, batch))

    def _predict(self, model: Any, inputs: Any) -> None:
        self.host.prediction_step(model, inputs, prediction_loss_only=True)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the weights that the user receives into the model: the averages, inside the techniques' contexts."""
        if self._swapped:
            yield
            return
        averages = self.averages() if self.host.is_in_train and not self.ended else None
        self._swapped = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_swapped", False)
            if averages is not None:
                weights.swap(self.host.model, averages)
                stack.callback(weights.swap, self.host.model, averages)
            for technique in self.roster.with_hook("for_inference"):
                stack.enter_context(technique.for_inference(self.host.model))
            yield

    def evaluate(self, plain: Callable[[], Any]) -> Any:
        """Evaluate the weights that the user receives; ``plain`` is Trainer's own method."""
        clock = self.meter.clock
        began = clock.seconds
        metrics = self.predict(plain)
        self.meter.evaluation_seconds = clock.seconds - began
        return metrics

    def predict(self, plain: Callable[[], Any]) -> Any:
        """Predict with the weights that the user receives; ``plain`` is Trainer's own method."""
        with self.meter.stopwatch.charge("evaluation"), self.in_place():
            return plain()

    def finish(self) -> None:
        """Leave the averages in the model, unless the best model is loaded at the end."""
        best = self.host.args.load_best_model_at_end and self.host.state.best_model_checkpoint
        if not best and (averages := self.averages()) is not None:
            weights.swap(self.host.model, averages)
