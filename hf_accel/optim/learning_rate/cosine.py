"""Cosine: after a warm-up, the learning rate falls on half a cosine wave.

The rate stays near its peak for longer than on a straight line, and near its end as well:

    factor(p) = p / warmup                                                            for p < warmup
    factor(p) = final + (1 - final) * (1 + cos(pi * (p - warmup) / (1 - warmup))) / 2   else

Reference: Loshchilov and Hutter (2017), SGDR: Stochastic gradient descent with warm restarts,
https://arxiv.org/abs/1608.03983.  Departures: there is one cycle, which ends with the budget, and it has a warm-up.
Trainer's ``cosine`` and ``cosine_with_min_lr`` are the same in steps; this one is exact for a budget of any unit.

When to use: to repeat a published recipe that has a cosine in it.
When not to use: as a default: for language models a linear decay to zero was better at the same budget
(https://arxiv.org/abs/2502.15938); with ``final`` above 0 the jitter of the last updates stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Fraction, Technique


def cosine(progress: float, *, warmup: float = 0.05, final: float = 0.0) -> float:
    """Factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


@dataclass(eq=False)
class Cosine(Technique):
    """The learning rate rises to its peak, then falls on half a cosine wave.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        final: Learning rate at the end, as a share of the peak, in [0, 1].
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05
    final: Fraction = 0.0  # SGDR's minimum

    def schedule(self, progress: float) -> float:
        return cosine(progress, warmup=self.warmup, final=self.final)
