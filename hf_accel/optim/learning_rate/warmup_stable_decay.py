"""Warm-up, stable, decay: a constant learning rate that cools down to zero over the last part of the budget.

A run can be prolonged from any point of its constant part; what it has to pay for the quality of a decayed run is only
the cooldown:

    factor(p) = p / warmup                                        for p < warmup
    factor(p) = 1 - sqrt((p - (1 - cooldown)) / cooldown)         for p > 1 - cooldown
    factor(p) = 1                                                 in between

Reference: Haegele et al. (2024), Scaling laws and compute-optimal training beyond fixed training durations,
https://arxiv.org/abs/2405.18392: with a cooldown of 20 % and this shape, equal to a cosine of the same length.

When to use: pre-training whose budget may be extended; with model growth, which wants a high rate at the growth.
When not to use: where runs are judged, or checkpoints chosen, before the cooldown: they look bad until then.  With a
known, short horizon a longer cooldown (0.4 to 0.6) or a linear decay from the start is at least as good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Technique


def warmup_stable_decay(progress: float, *, warmup: float = 0.05, cooldown: float = 0.2) -> float:
    """Factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    remaining = 1 - progress
    return 1 - math.sqrt(1 - remaining / cooldown) if remaining < cooldown else 1.0


@dataclass(eq=False)
class WarmupStableDecay(Technique):
    """The learning rate rises, stays, and cools down to zero.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        cooldown: Share of the budget, in (0, 1], in which it falls; with ``warmup`` at most the whole.
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05
    cooldown: Annotated[float, at.Interval(gt=0, le=1)] = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"{self!r}: warmup + cooldown must be <= 1. Shorten one.")

    def schedule(self, progress: float) -> float:
        return warmup_stable_decay(progress, warmup=self.warmup, cooldown=self.cooldown)
