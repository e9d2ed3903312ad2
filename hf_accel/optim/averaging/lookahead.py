"""Every few steps, move slow weights part of the way to the fast ones, and continue from there.

Beside the weights w, which the optimizer trains ("fast"), there are slow weights s.  After every ``k`` steps both meet:

    s <- s + alpha (w - s),        w <- s,        s = w at the start

So the optimizer looks ``k`` steps ahead and keeps a share ``alpha`` of the way.  Steps of opposite direction cancel.
This makes a larger learning rate stable, and lowers the variance of the weights.

Evaluation, saving and the final model use s + alpha (w - s), the slow weights as if both met at that moment.  So no
step is lost.  They are averaged weights, so no other average can be kept beside them.  A meeting leaves the optimizer's
state unchanged.

Lookahead costs one more copy of the trainable weights, with their sharding, and a pass over both every ``k`` steps.

Recommendation: Use Lookahead if your run is noisy and you cannot tune its learning rate.
When to use: A noisy run with a learning rate that you cannot tune; the authors report that it matters less then.
When not to use:
- A tuned learning rate that decays to zero.
- Runs for which an average of the weights is enough, because an average does not change training.
Defaults: 5 steps and a share of 0.5 are the authors' values; they also use 10 and 0.8.
Differences from the paper:
- The slow weights of fp16 or bf16 weights are fp32.
- Before each evaluation and checkpoint, up to 1,024 training examples give the slow weights their own statistics of
  batch normalization (``batch norm`` in the receipt).
Reference: Zhang, Lucas, Hinton, Ba (2019), Lookahead Optimizer: k steps forward, 1 step back,
https://arxiv.org/abs/1907.08610.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.updates.running_average import RunningAverage, at_least_float32


@dataclass(eq=False)
class Lookahead(RunningAverage):
    """Train fast weights that return to slow ones; evaluate, save and return the slow ones.

    It covers the parameters that are trainable when training starts.

    Args:
        k: Optimizer steps between two meetings, above 0.
        alpha: Share of the way to the fast weights that the slow ones move, in (0, 1].
    """

    k: Annotated[int, at.Gt(0)] = 5  # the authors'; also 10
    alpha: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # the authors'; also 0.8

    neutral: ClassVar = {"k": 1, "alpha": 1.0}
    refused_backends: ClassVar = {"zero": "its optimizer overwrites the weights with its own master copies"}
    claims: ClassVar = frozenset({"early_weights", "slow_weights"})

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.run_.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. Use FSDP."
            )
        self.averages_ = at_least_float32(self.weights())

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.k:
            return
        weights = self.weights()
        for name, slow in self.averages_.items():
            slow.lerp_(weights[name].to(slow.dtype), self.alpha)
            weights[name].copy_(slow)
        self.updates_ += 1

    def averaging(self) -> dict[str, Tensor] | None:
        """Return copies of the slow weights, as if they met the fast ones now."""
        weights = self.weights()
        met = {n: slow.lerp(weights[n].to(slow.dtype), self.alpha) for n, slow in self.averages_.items()}
        return {name: weight.to(weights[name].dtype) for name, weight in met.items()} or None

    def report(self):
        """Report how often slow and fast weights have met."""
        return {"meetings": self.updates_}

    def took_effect(self, report):
        return report["meetings"] > 0
