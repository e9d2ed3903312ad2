"""Evaluate, save and return the plain mean of the weights from the last part of a run.

While the learning rate stays high, the weights move around a wide flat region.  Their mean lies nearer to its middle
than any of them, where the model generalizes better.  From progress ``start`` on, the weights w_1, w_2, ... w_n at each
share ``every`` of the budget are averaged equally:

    e <- e + (w_n - e) / n

Training itself never reads e.  Until ``start`` there is no average, and the weights themselves are evaluated and saved.
If ``every`` is shorter than a step, each step is averaged.

The average costs one more copy of the trainable weights and a pass over them at each share.  It has the sharding of the
weights, and is fp32 for fp16 and bf16 weights.

Recommendation: Use StochasticWeightAveraging if you train a convolutional network for long with a learning rate that
stays high.
When to use: Long runs of convolutional networks with a learning rate that stays high to the end.  The authors report
0.6 to 0.9 points of accuracy on ImageNet after ten more epochs of pre-trained models.
When not to use:
- A learning rate that decays to zero, because the last weights are then better than those at ``start``.
- Runs with evaluations before ``start`` that should use an average, which `ExponentialMovingAverage` and
  `LatestWeightAveraging` provide.
Differences from the paper:
- The learning rate follows the run's own schedule.  The authors hold it constant or cycle it from ``start`` on;
  `WarmupStableDecay` without much decay holds it.
- The average is kept in at least fp32.
- Batch normalization gets new statistics from up to 1,024 training examples before each evaluation and checkpoint
  (``batch norm`` in the receipt).  The authors compute them, too.
Reference: Izmailov et al. (2018), Averaging Weights Leads to Wider Optima and Better Generalization,
https://arxiv.org/abs/1803.05407.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
from torch.optim.swa_utils import get_swa_multi_avg_fn

from hf_accel.clock import passes
from hf_accel.technique import Fraction
from hf_accel.updates.running_average import RunningAverage, at_least_float32, move


@dataclass(eq=False)
class StochasticWeightAveraging(RunningAverage):
    """Evaluate, save and return the mean of the weights from some progress on.

    It covers the parameters that are trainable when training starts.

    Args:
        start: Progress, in [0, 1], from which weights are averaged.
        every: Share of the budget between two weights that are averaged, in (0, 1].
    """

    start: Fraction = 0.75  # the authors begin after 75 % of a usual run
    every: Annotated[float, at.Interval(gt=0, le=1)] = 0.01  # the authors: one epoch of some hundreds

    neutral: ClassVar = {"start": 1.0}
    """The mean covers the last weights alone."""

    variations: ClassVar = {"every": 0.1}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.progress_ = self.progress(state)

    def on_step_end(self, args, state, control, **kwargs):
        before, self.progress_ = self.progress_, self.progress(state)
        if self.progress_ < self.start or not passes(before, self.progress_, self.every):
            return
        weights = self.weights()
        if self.updates_ == 0:
            self.averages_ = at_least_float32(weights)
        else:
            move(get_swa_multi_avg_fn(), self.averages_, weights, self.updates_)
        self.updates_ += 1

    def report(self):
        """Report how many weights the mean covers."""
        return {"averaged": self.updates_}

    def took_effect(self, report):
        return report["averaged"] > 0
