"""Lookahead: every few steps, go back part of the way to where the last look ahead began.

Beside the weights w, which the optimizer trains ("fast"), there are slow weights s.  After every ``k`` steps both meet:

    s <- s + alpha (w - s),        w <- s,        s = w at the start

so that the optimizer looks ``k`` steps ahead, of which ``alpha`` is kept.  Steps of opposite direction cancel, which
lets a larger learning rate be stable, and lowers the variance of where the weights are.

What is evaluated, saved and returned is s + alpha (w - s): the slow weights, as if both met at that moment, so that no
step is lost.  As averages are, so no other average can be kept beside them.  The optimizer's state stays as it is.

It costs one more copy of the trainable weights, sharded as these are, and a pass over both every ``k`` steps.

Reference: Zhang, Lucas, Hinton, Ba (2019), Lookahead Optimizer: k steps forward, 1 step back,
https://arxiv.org/abs/1907.08610.  Departures: slow weights of fp16 or bf16 weights are kept in fp32; statistics of
batch normalization are computed anew for them, from up to 1,024 training examples before each evaluation and
checkpoint (``batch norm`` in the receipt).

When to use: a noisy run whose learning rate cannot be tuned; the authors report that it matters less then.
When not to use: a tuned learning rate that decays to zero; where averages of weights alone will do, which leave
training as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.optim.averaging.running_average import RunningAverage, at_least_float32


@dataclass(eq=False)
class Lookahead(RunningAverage):
    """Trains fast weights that return to slow ones; evaluates, saves and returns the slow ones.

    It covers the parameters that are trainable when training starts.

    Args:
        k: Optimizer steps between two meetings, above 0; the authors take 5, or 10.
        alpha: Share of the way to the fast weights that the slow ones go, in (0, 1]; the authors take 0.5, or 0.8.
    """

    k: Annotated[int, at.Gt(0)] = 5
    alpha: Annotated[float, at.Interval(gt=0, le=1)] = 0.5

    neutral: ClassVar = {"k": 1, "alpha": 1.0}
    refused_backends: ClassVar = {"zero": "its optimizer would write its own masters over the weights"}
    claims: ClassVar = frozenset({"early_weights", "slow_weights"})

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.run_.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r}: under DeepSpeed ZeRO, the optimizer writes copies of its own over the weights. Use FSDP."
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
        """The slow weights, as if they met the fast ones now; copies."""
        weights = self.weights()
        met = {n: slow.lerp(weights[n].to(slow.dtype), self.alpha) for n, slow in self.averages_.items()}
        return {name: weight.to(weights[name].dtype) for name, weight in met.items()} or None

    def report(self):
        """How often slow and fast weights have met."""
        return {"meetings": self.updates_}

    def took_effect(self, report):
        return report["meetings"] > 0
