"""Stochastic weight averaging: evaluate, save and return the plain mean of the weights of the last part of a run.

From progress ``start`` on, the weights w_1, w_2, ... w_n at each share ``every`` of the budget are averaged equally:

    e <- e + (w_n - e) / n

Training itself never sees e.  Until ``start`` there is no average, and the weights themselves are evaluated and saved.
Where ``every`` is less than a step, each step is averaged.

While the learning rate stays high, the weights go around a wide flat region, and their mean lies nearer to its middle
than any of them, where the model generalizes better.

It costs one more copy of the trainable weights, in fp32 of fp16 and bf16 ones, sharded as these are, and a pass over
them at each share.

Reference: Izmailov et al. (2018), Averaging Weights Leads to Wider Optima and Better Generalization,
https://arxiv.org/abs/1803.05407.  Departures: the learning rate stays that of the run's own schedule, where the authors
hold it or let it cycle from ``start`` on (`WarmupStableDecay` without much decay holds it); the average is kept in at
least fp32.  Statistics of batch normalization are computed anew for the averaged weights, as the authors do, but from
up to 1,024 training examples before each evaluation and checkpoint (``batch norm`` in the receipt).

When to use: long runs of convolutional networks whose learning rate stays high to the end; the authors report 0.6 to
0.9 points of accuracy on ImageNet after ten more epochs of pre-trained models.
When not to use: a learning rate that decays to zero, for the last weights are then better than those at ``start``;
evaluations before ``start`` that are to profit (`ExponentialMovingAverage` and `LatestWeightAveraging` serve these).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
from torch.optim.swa_utils import get_swa_multi_avg_fn

from hf_accel.clock import passes
from hf_accel.optim.averaging.running_average import RunningAverage, at_least_float32, move
from hf_accel.technique import Fraction


@dataclass(eq=False)
class StochasticWeightAveraging(RunningAverage):
    """Evaluates, saves and returns the mean of the weights from some progress on.

    It covers the parameters that are trainable when training starts.

    Args:
        start: Progress, in [0, 1], from which weights are averaged; the authors begin after 75 % of a usual run.
        every: Share of the budget between two weights that are averaged, in (0, 1]; the authors take an epoch, of some
            hundreds.
    """

    start: Fraction = 0.75
    every: Annotated[float, at.Interval(gt=0, le=1)] = 0.01

    neutral: ClassVar = {"start": 1.0}
    """The mean of the last weights alone."""

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
        """How many weights the mean is of."""
        return {"averaged": self.updates_}

    def took_effect(self, report):
        return report["averaged"] > 0
