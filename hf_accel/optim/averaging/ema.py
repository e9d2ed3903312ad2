"""Keep an exponential moving average of the weights; evaluate, save and return the average.

Beside the weights w, one average e is updated after every optimizer step:

    e <- e + (1 - d) (w - e),        e = w at the start

    d = min(2^(-q / half_life), (1 + n) / (10 + n))        if half_life < 1, a share of the budget
    d = 2^(-1 / half_life)                                 if half_life >= 1, in steps

with q the progress of the step and n the updates before it.  So weights from one half-life ago count half as much as
the current ones, and the first weights soon count for nothing.  Training itself never reads e.

At a learning rate that still makes progress, the weights jump around a point that is better than any of them.  The
average is near that point now; without it, you first have to spend steps on decaying the learning rate.  So a run
reaches its target earlier, by about 12 % of GPU hours over the workloads of AlgoPerf (1).  Evaluations during the run
show roughly the quality of an annealed model.

The average costs one more copy of the trainable weights and one pass over them per step.  It has the sharding of the
weights, and is fp32 for fp16 and bf16 weights.

Recommendation: Use ExponentialMovingAverage if your learning rate stays high, or if a run may stop at any time.
When to use:
- A learning rate that stays high, or a run that may be stopped at any time.
- Evaluations that choose a checkpoint or end a run.
When not to use:
- A learning rate that decays to zero, because it leaves little to gain.
- Short runs with a long half-life, because the average lags behind.
Defaults: A window of 1 % of all steps is best over the workloads of AlgoPerf (1).  For the start, (1 + n) / (10 + n) is
the usual warm-up of such averages, as in diffusers.
Differences from the paper:
- The average of fp16 or bf16 weights is fp32, because their 8 to 11 bits lose updates below 1 %.
- Buffers are not averaged.  With batch normalization, up to 1,024 training examples give the averaged weights their own
  statistics before each evaluation and checkpoint (``batch norm`` in the receipt).
References: (1) Ajroldi, Orvieto, Geiping, "When, Where and Why to Average Weights?", ICML 2025, arXiv:2502.06761; (2)
Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerState

from hf_accel.technique import Positive
from hf_accel.updates.running_average import RunningAverage, at_least_float32, move


def ema_update(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """Move each average in place toward the weight with the same name: e <- e + (1 - decay) (w - e).

    ``decay`` is in [0, 1]; 2^(-1/h) gives a half-life of h updates.  In your own loop, start with cloned weights.
    """
    move(get_ema_multi_avg_fn(decay), averages, weights)


@dataclass(eq=False)
class ExponentialMovingAverage(RunningAverage):
    """Evaluate, save and return an exponential moving average of the weights.

    It covers the parameters that are trainable when training starts.

    Args:
        half_life: Share of the budget, below 1, or number of steps, from 1 on, after which weights count half.
    """

    half_life: Positive = 0.01

    fidelity: ClassVar = "lossy"
    """Training has exactly the same weights; evaluation, saving and the final model have the average."""

    neutral: ClassVar = {"half_life": 1e-6}
    """A step is thousands of half-lives, so the average equals the weights of the last step bit for bit."""
    claims: ClassVar = frozenset({"early_weights"})

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
