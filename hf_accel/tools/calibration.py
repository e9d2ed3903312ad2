"""Predict the duration of a run, or the steps within a budget, from a run of seconds.

A short run of a copy of the model, with the user's data, techniques and loop, gives the mean duration of a step.  It
goes through all of its progress, like the whole run.  Evaluations of two sizes give the cost per example and the fixed
cost of an evaluation.  The model is saved once.  Then, with S steps,

    seconds = start + S * step + evaluations(S) * evaluation + checkpoints(S) * checkpoint
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_accel.engine.short_run import many_runs, probe_of, short_run
from hf_accel.technique import Technique

WARM = 2
"""Steps at the start that are not timed."""

PROBED_BATCHES = 5
"""Batches of the larger timed evaluation."""

CHECKPOINT = 3.0
"""Duration of a checkpoint, relative to saving the model: the optimizer holds two more values per weight."""


@dataclass(eq=False)
class Timing(Technique):
    """Record when the first step begins and when each step ends."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.moments_ = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.moments_:
            self.moments_.append(self.run_.clock.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        self.moments_.append(self.run_.clock.seconds)

    def step_seconds(self) -> float:
        """Return the mean duration of a step, without the first steps if there are enough."""
        moments = self.moments_[WARM if len(self.moments_) > 2 * WARM else 0 :]
        return (moments[-1] - moments[0]) / (len(moments) - 1)


@dataclass
class Rhythm:
    """How often a run evaluates, or saves.

    Args:
        each_step: Mean number per step.
        once: Number per run, whatever its length.
    """

    each_step: float = 0.0
    once: float = 0.0


@dataclass
class Forecast:
    """Predict durations and steps from measurements.

    Args:
        start: Seconds before the first step.
        step: Seconds of a step.
        evaluation: Seconds of a whole evaluation.
        checkpoint: Seconds of a checkpoint.
        batch: Examples per update.
        spent: Amount of each unit except seconds that a step spends.
        measured_steps: Number of timed steps.
        cost: Seconds of the measurement.
    """

    start: float
    step: float
    evaluation: float
    checkpoint: float
    batch: int
    spent: dict[str, float]
    measured_steps: int
    cost: float
    evaluations: Rhythm = field(default_factory=Rhythm)
    checkpoints: Rhythm = field(default_factory=Rhythm)

    @property
    def each_step(self) -> float:
        """Return the seconds of a step with its share of evaluations and checkpoints."""
        regular = self.evaluations.each_step * self.evaluation + self.checkpoints.each_step * self.checkpoint
        return self.step + regular

    @property
    def once(self) -> float:
        """Return the seconds that do not depend on the number of steps."""
        return self.start + self.evaluations.once * self.evaluation + self.checkpoints.once * self.checkpoint

    def seconds(self, steps: float) -> float:
        """Return the duration of a run with this number of steps."""
        return self.once + steps * self.each_step

    def steps(self, limits: Mapping[str, float]) -> int:
        """Return the number of steps within limits; raise ValueError if not one fits."""
        bought = []
        for unit, limit in limits.items():
            available = limit - self.once if unit == "seconds" else limit
            each = self.each_step if unit == "seconds" else self.spent[unit]
            if not each:
                raise ValueError(f"budget: the batches hold no {unit}. Give samples or epochs.")
            bought.append(available / each)
        steps = math.floor(min(bought) + 1e-6)
        if steps < 1:
            raise ValueError(
                f"budget: the start, one step and the evaluations take {self.seconds(1):.3g} s, and the budget is "
                "less. Give more."
            )
        return steps


def calibrate(trainer: Any, *, seconds: float = 30.0, without: Sequence[Technique] = ()) -> Forecast:
    """Measure the steps of a trainer that hosts techniques and has not started, and leave it unchanged.

    Args:
        seconds: Seconds of the short run; evaluations of some batches are extra.
        without: Techniques that the short run omits.
    """
    engine, clock = trainer.accel, trainer.clock
    began = clock.now()
    counted = {unit: math.inf for unit in engine.limits().amounts if unit in ("flops", "joules")}
    args, size = trainer.args, trainer.args.eval_batch_size
    evaluates, saves = IntervalStrategy(args.eval_strategy).value, SaveStrategy(args.save_strategy).value
    few, more = (None, None) if evaluates == "no" else (probe_of(engine, size), probe_of(engine, PROBED_BATCHES * size))
    timing = Timing()
    with many_runs():
        rate, limits = args.learning_rate, {"seconds": seconds, **counted}
        first = short_run(engine, rate, {"steps": WARM}, without=without, probe=few)
        run = short_run(engine, rate, limits, techniques=[timing], without=without, probe=more)
    step, spent = timing.step_seconds(), {unit: run.spent[unit] / run.steps for unit in run.spent if unit != "seconds"}
    per_epoch = spent["epochs"]
    return Forecast(
        start=timing.moments_[0],
        step=step,
        evaluation=0.0 if evaluates == "no" else _of_all(trainer, first, run),
        checkpoint=0.0 if saves == "no" else CHECKPOINT * _saving_seconds(trainer),
        batch=engine.nominal_batch_size,
        spent=spent,
        measured_steps=run.steps,
        cost=clock.now() - began,
        evaluations=_rhythm(evaluates, args.eval_steps, per_epoch, float(args.eval_on_start)),
        checkpoints=_rhythm(saves, args.save_steps, per_epoch, 0.0),
    )


def _of_all(trainer: Any, few: Any, more: Any) -> float:
    """Estimate the seconds of the whole evaluation from those of two parts."""
    data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    parts = list(data.values()) if isinstance(data, dict) else [data]
    examples = sum(map(len, parts))
    if more.evaluated == few.evaluated:
        return more.evaluation_seconds * examples / more.evaluated
    each = (more.evaluation_seconds - few.evaluation_seconds) / (more.evaluated - few.evaluated)
    each = each if each > 0 else more.evaluation_seconds / more.evaluated
    return max(more.evaluation_seconds + each * (examples - more.evaluated), 0.0)


def _rhythm(strategy: str, every: float | None, epochs_of_a_step: float, once: float) -> Rhythm:
    if strategy == "epoch":
        return Rhythm(each_step=epochs_of_a_step, once=once)
    if strategy in ("steps", "best") and every:
        return Rhythm(once=once + math.floor(1 / every)) if every < 1 else Rhythm(each_step=1 / every, once=once)
    return Rhythm(once=once)


def _saving_seconds(trainer: Any) -> float:
    began = trainer.clock.now()
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder, _internal_call=True)
    return trainer.clock.now() - began
