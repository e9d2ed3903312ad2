"""Exponential moving average of the weights: evaluate, save and return an average of the last steps.

Beside the weights w, one running average e of them, updated after every optimizer step:

    e <- e + (1 - d) (w - e),        e = w at the start

    d = min(2^(-q / half_life), (1 + n) / (10 + n))        half_life < 1, a share of the budget
    d = 2^(-1 / half_life)                                 half_life >= 1, in steps

with q the progress that the step made and n the updates before it.  So the weights of one half life ago count half as
much as the present ones, and those of the start soon count for nothing.  Training itself never sees e.

At a learning rate that still makes progress, the weights jump about a point that is better than any of them.  The
average is near that point now; without it, one has to spend steps on decaying the learning rate first.  So a target is
reached earlier, by about 12 % of GPU hours over the workloads of AlgoPerf (1), and evaluations show about what an
annealed model would reach.

It costs one more copy of the trainable weights, in fp32 of fp16 and bf16 ones, sharded as these are, and one pass over
them a step.

Reference: (1) Ajroldi, Orvieto, Geiping, "When, Where and Why to Average Weights?", ICML 2025, arXiv:2502.06761; (2)
Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992.  Departures: the average of fp16 or
bf16 weights is kept in fp32, for an update by less than a percent vanishes in their 8 to 11 bits; buffers are not
averaged, and where the model has batch normalization, its statistics are computed anew for the averaged weights, from
up to 1,024 training examples before each evaluation and checkpoint (``batch norm`` in the receipt).

When to use: a learning rate that stays high, or a run that may be stopped at any time; evaluations that choose a
checkpoint or end a run.
When not to use: a learning rate that decays to zero, which leaves little to gain; a half life that is long against the
run, as the average then lags behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerState

from hf_accel.optim.averaging.running_average import RunningAverage, at_least_float32, move
from hf_accel.technique import Positive


def ema_update(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """Move each average, in place, toward the weight of the same name: e <- e + (1 - decay) (w - e).

    ``decay`` is in [0, 1], 2^(-1/h) for a half life of h updates.  For any loop: start with clones of the weights.
    """
    move(get_ema_multi_avg_fn(decay), averages, weights)


@dataclass(eq=False)
class ExponentialMovingAverage(RunningAverage):
    """Evaluates, saves and returns an exponential moving average of the weights.

    It covers the parameters that are trainable when training starts.

    Args:
        half_life: Share of the budget, below 1, or number of steps, from 1 on, after which weights count half.  A
            window of 1 % of all steps is best over the workloads of AlgoPerf (1).
    """

    half_life: Positive = 0.01

    fidelity: ClassVar = "lossy"
    """The weights of training stay exactly the same; those that are evaluated, saved and returned are others."""

    neutral: ClassVar = {"half_life": 1e-6}
    """A step is thousands of half lives, so that each average equals the weights of the last step to the bit."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.averages_ = at_least_float32(self.weights())
        self.progress_ = 0.0 if self.half_life >= 1 else self.progress(state)

    def on_step_end(self, args, state, control, **kwargs):
        ema_update(self.averages_, self.weights(), self._decay(state))
        self.updates_ += 1

    def _decay(self, state: TrainerState) -> float:
        if self.half_life >= 1:
            return 2 ** (-1 / self.half_life)
        before, self.progress_ = self.progress_, self.progress(state)
        warmed_up = (1 + self.updates_) / (10 + self.updates_)
        return min(2 ** ((before - self.progress_) / self.half_life), warmed_up)

    def report(self):
        return {"half_life": self.half_life, "updates": self.updates_}
