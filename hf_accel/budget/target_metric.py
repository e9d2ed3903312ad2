"""Stop as soon as an evaluation is good enough; the budget is the upper bound.

A run that stops at its target saves the rest of its budget:

    stop when  metric <= value   (less is better),   metric >= value   (more is better)

The metric is any that the evaluation returns: the loss, or a result of ``compute_metrics``, for example from the
library ``evaluate``.  If weights are averaged, the run evaluates and returns the average.  The learning rate does not
change, so a run that is stopped early has not cooled down.

Recommendation: Use TargetMetric if you know which metric is good enough and a better model is worth nothing to you.
When to use: Runs with a known target, if a better model is worth nothing.
When not to use: To compare runs that differ in their schedule.  The one that decays earlier reaches a target earlier,
and may end worse.
Defaults: A loss of 0 is never reached, so set ``value``.
Differences from the paper: None.
Example: TargetMetric(metric="accuracy", value=0.9)
Reference: Dahl et al. (2023), Benchmarking neural network training algorithms, https://arxiv.org/abs/2306.07179, for
time to a target as the measure of training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_accel.metrics import greater_is_better
from hf_accel.recipe.technique_syntax import nearest
from hf_accel.technique import Technique

EVERY = 0.05
"""Share of the run between evaluations if the arguments ask for none."""


@dataclass(eq=False)
class TargetMetric(Technique):
    """End the run at the first evaluation with a metric that has reached a value.

    Args:
        metric: Name of the metric, with or without ``eval_``.
        value: Value that is good enough.
        greater_is_better: Whether more is better.  None: as Trainer and ``evaluate`` declare it; other metrics need it.
    """

    metric: str = "loss"
    value: float = 0.0  # a loss never reaches it
    greater_is_better: bool | None = None
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"metric": "runtime", "value": 3.5, "greater_is_better": True}
    counters: ClassVar = ("found",)

    def __post_init__(self) -> None:
        super().__post_init__()
        greater_is_better(self.metric, self.greater_is_better)

    def prepare_args(self, args: TrainingArguments) -> TrainingArguments:
        """Turn evaluations on if there are none."""
        if args.eval_strategy == IntervalStrategy.NO:
            args = copy.copy(args)
            args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, EVERY
        return args

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.found_: dict[str, float] = {}
        self.others_: set[str] = set()
        self.training_ = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not getattr(self, "training_", False):
            return
        name = f"eval_{self.metric.removeprefix('eval_')}"
        if name not in metrics:
            self.others_.update(metrics)
            return
        self.others_.clear()
        sign = 1 if greater_is_better(self.metric, self.greater_is_better) else -1
        value = float(metrics[name])
        self.found_["best"] = max(self.found_.get("best", value), value, key=lambda seen: sign * seen)
        if sign * value >= sign * self.value and "reached_at_step" not in self.found_:
            self.found_ |= {"reached_at_step": state.global_step, "reached_at_progress": self.progress(state)}
            control.should_training_stop = True

    def on_step_begin(self, args, state, control, **kwargs):
        if self.others_ and "best" not in self.found_:
            there = sorted(name.removeprefix("eval_") for name in self.others_)
            raise ValueError(f"{self!r}: the evaluation returns no {self.metric!r}. {nearest(self.metric, there)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.training_ = False

    def report(self) -> Mapping[str, Any]:
        """Report the best value, and the step and progress at which the target was reached, if at all."""
        return dict(self.found_)

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Return whether an evaluation had the metric."""
        return "best" in report
