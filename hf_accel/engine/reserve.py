"""Keeps back the seconds that the end of a timed run takes: an evaluation and a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import has_length

from hf_accel.adapters import is_adapted
from hf_accel.engine.meter import Meter
from hf_accel.host.view import TrainerView
from hf_accel.preserve import evaluation_mode, keyed_random, random_state_kept

BATCHES = 3
"""How many batches of an evaluation are measured."""
STEADY = 5
"""The first step whose pace is one to compare others with."""


class EndReserve:
    """What follows the last update in a run that ends on time: an evaluation and a checkpoint.

    Measured: first from a few batches and from the size of the model, then from every evaluation and checkpoint.  The
    evaluation is scaled by how much longer a position of a step takes now than when it was measured, for a machine
    that gets other work will evaluate as slowly as it trains.
    """

    def __init__(self, host: TrainerView, meter: Meter):
        args = host.args
        self.meter, self.keeps_best = meter, args.load_best_model_at_end
        self.steps, self.positions = 0, 0.0
        self.pace_when_measured = 0.0
        self.measured: float | None = None
        self.evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        self.saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        meter.evaluation_seconds = probe_evaluation(host, meter.clock.now) if self.evaluates else 0.0
        meter.saving_seconds = guess_saving(host.model) if self.saves else 0.0

    def seconds(self) -> float:
        """The reserve: what is kept back of the budget."""
        meter = self.meter
        seconds = meter.evaluation_seconds * self._slowdown() if self.evaluates else 0.0
        meter.clock.evaluation_seconds = seconds
        if self.saves:
            seconds += meter.saving_seconds * (2 if self.keeps_best else 1)
        return seconds + 0.05

    def _slowdown(self) -> float:
        """Seconds of a position now over those when the evaluation was measured; both about of the last ten steps.

        1 until the fifth step, for the first ones load and compile.
        """
        meter, duration = self.meter, self.meter.clock.step_seconds
        if duration == 0 or meter.positions == 0:
            return 1.0
        self.positions += (meter.positions - self.positions) * (0.1 if self.positions else 1.0)
        self.steps += 1
        if self.steps < STEADY:
            return 1.0
        pace = duration / self.positions
        if self.measured != meter.evaluation_seconds:
            self.measured, self.pace_when_measured = meter.evaluation_seconds, pace
        return min(max(pace / self.pace_when_measured, 0.5), 4.0)


def probe_evaluation(host: TrainerView, now: Callable[[], float]) -> float:
    """Seconds of one evaluation, from the duration of a few batches of the trainer's own loader.

    Where metrics are computed, a batch is predicted as for these, with generation if the arguments ask for it.
    """
    args, data = host.args, host.eval_dataset
    loss_only = args.prediction_loss_only or host.compute_metrics is None
    generation: dict[str, Any] = {}
    if not loss_only and getattr(args, "predict_with_generate", False):
        generation = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    seconds = 0.0
    for name in data if isinstance(data, dict) else [None]:
        if not has_length(data if name is None else data[name]):
            continue  # an unmeasurable stream of examples: the first evaluation will tell
        with evaluation_mode(host.model), keyed_random(), random_state_kept(args.device):
            loader = host.get_eval_dataloader(name)
            batches: Any = getattr(loader, "base_dataloader", loader)  # accelerate's own would count as a loader in use
            durations = []
            for inputs in itertools.islice(batches, BATCHES):
                inputs = host.prepare_inputs(inputs)
                began = now()
                host.prediction_step(host.model, inputs, prediction_loss_only=loss_only, **generation)
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                durations.append(now() - began)
        seconds += len(loader) * min(durations, default=0.0)
    return seconds


def guess_saving(model: nn.Module) -> float:
    """Seconds of one checkpoint on a disk that writes 300 MB a second: of the weights, or of adapters alone, and of two
    moments of what is trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    weights = trained if is_adapted(model) else sum(size for size, _ in sizes)
    return 0.1 + (weights + 2 * trained) / 300e6
