"""Reserve the seconds that the end of a timed run takes: an evaluation and a checkpoint."""

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
"""Number of batches in the first measurement of an evaluation."""
STEADY = 5
"""First step with a steady pace; earlier steps load and compile."""


class EndReserve:
    """Predict the seconds after the last update, so that the run ends on time.

    The first prediction uses a few batches and the size of the model; every evaluation and checkpoint updates it.  The
    prediction of an evaluation follows the training pace, because a machine that trains more slowly also evaluates
    more slowly.
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
        """Return the reserve, in seconds."""
        meter = self.meter
        seconds = meter.evaluation_seconds * self._slowdown() if self.evaluates else 0.0
        meter.clock.evaluation_seconds = seconds
        if self.saves:
            seconds += meter.saving_seconds * (2 if self.keeps_best else 1)
        return seconds + 0.05

    def _slowdown(self) -> float:
        """Return the seconds per position now, divided by those at the measurement of the evaluation.

        Both are averages over about the last ten steps.  Return 1 before the fifth step.
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
    """Estimate the seconds of one evaluation from a few batches of the trainer's own loader.

    If the trainer computes metrics, predict for them, with generation if the arguments ask for it.
    """
    args, data = host.args, host.eval_dataset
    loss_only = args.prediction_loss_only or host.compute_metrics is None
    generation: dict[str, Any] = {}
    if not loss_only and getattr(args, "predict_with_generate", False):
        generation = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    seconds = 0.0
    for name in data if isinstance(data, dict) else [None]:
        if not has_length(data if name is None else data[name]):
            continue  # unknown length: the first evaluation tells
        with evaluation_mode(host.model), keyed_random(), random_state_kept(args.device):
            loader = host.get_eval_dataloader(name)
            batches: Any = getattr(loader, "base_dataloader", loader)  # accelerate's would count as a loader in use
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
    """Estimate the seconds of one checkpoint on a disk that writes 300 MB a second.

    The checkpoint holds the weights, or only the adapters, and two moments of each trained parameter.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    weights = trained if is_adapted(model) else sum(size for size, _ in sizes)
    return 0.1 + (weights + 2 * trained) / 300e6
