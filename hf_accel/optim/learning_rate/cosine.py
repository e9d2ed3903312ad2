"""Warm up, then lower the learning rate on half a cosine wave.

The rate stays near its peak for longer than on a straight line, and near its end as well:

    factor(p) = p / warmup                                                            for p < warmup
    factor(p) = final + (1 - final) * (1 + cos(pi * (p - warmup) / (1 - warmup))) / 2   else

Recommendation: Use Cosine if you repeat a published recipe with a cosine schedule.
When to use: To repeat a published recipe with a cosine schedule.
When not to use:
- As a default: for language models a linear decay to zero was better at the same budget
  (https://arxiv.org/abs/2502.15938).
- With ``final`` above 0, unless the recipe needs it: the jitter of the last updates stays.
Differences from the paper: The schedule has one cycle, which ends with the budget, and a warm-up.  Trainer's ``cosine``
and ``cosine_with_min_lr`` are the same in steps; this one is exact for a budget of any unit.
Reference: Loshchilov and Hutter (2017), SGDR: Stochastic gradient descent with warm restarts,
https://arxiv.org/abs/1608.03983.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Fraction, Technique


def cosine(progress: float, *, warmup: float = 0.05, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


@dataclass(eq=False)
class Cosine(Technique):
    """Raise the learning rate to its peak, then lower it on half a cosine wave.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        final: Learning rate at the end, as a share of the peak, in [0, 1].
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05  # not taken from a paper
    final: Fraction = 0.0  # SGDR's minimum

    def schedule(self, progress: float) -> float:
        return cosine(progress, warmup=self.warmup, final=self.final)
