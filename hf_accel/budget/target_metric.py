"""TargetMetric: stop as soon as an evaluation is good enough; the budget is the upper bound.

    stop when  metric <= value   (a loss),   metric >= value   (anything else)

The metric is any that the evaluation gives: the loss, or what ``compute_metrics`` makes, of the library ``evaluate``
for example.  Where weights are averaged, the average is what is evaluated, and what the run returns.  The learning rate
is where it was: a run that is stopped early has not cooled down.

Reference: Dahl et al. (2023), Benchmarking neural network training algorithms, https://arxiv.org/abs/2306.07179, for
time to a target as the measure of training.

When to use: what is good enough is known, and a better model is worth nothing.
When not to use: to compare runs that differ in their schedule: the one that decays earlier reaches a target earlier,
and may end worse.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_accel.recipe.technique_syntax import nearest
from hf_accel.technique import Technique

EVERY = 0.05
"""Share of the run between evaluations, where the arguments ask for none."""


@dataclass(eq=False)
class TargetMetric(Technique):
    """Ends the run at the first evaluation whose metric has reached a value.

    Args:
        metric: Its name, with or without ``eval_``.
        value: What is good enough.
        greater_is_better: Whether more is better; None: unless the name ends with ``loss``, as Trainer has it.
    """

    metric: str = "loss"
    value: float = 0.0  # of a loss: never
    greater_is_better: bool | None = None
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"metric": "runtime", "value": 3.5, "greater_is_better": True}
    counters: ClassVar = ("found",)

    def prepare_args(self, args: TrainingArguments) -> TrainingArguments:
        """Without evaluations there would be nothing to stop at."""
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
        sign = 1 if self._greater_is_better() else -1
        value = float(metrics[name])
        self.found_["best"] = max(self.found_.get("best", value), value, key=lambda seen: sign * seen)
        if sign * value >= sign * self.value and "reached_at_step" not in self.found_:
            self.found_ |= {"reached_at_step": state.global_step, "reached_at_progress": self.progress(state)}
            control.should_training_stop = True

    def on_step_begin(self, args, state, control, **kwargs):
        if self.others_ and "best" not in self.found_:
            there = sorted(name.removeprefix("eval_") for name in self.others_)
            raise ValueError(f"{self!r}: the evaluation gives no {self.metric!r}. {nearest(self.metric, there)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.training_ = False

    def _greater_is_better(self) -> bool:
        return not self.metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    def report(self) -> Mapping[str, Any]:
        """The best value of an evaluation, and at which step and progress the target was reached, if it was."""
        return dict(self.found_)

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """The metric was watched."""
        return "best" in report
