"""Keep the learning rate constant, and lower it to zero over the last part of the budget.

You can extend a run from any point of its constant part.  Only the cooldown is added to reach the quality of a decayed
run:

    factor(p) = p / warmup                                        for p < warmup
    factor(p) = 1 - sqrt((p - (1 - cooldown)) / cooldown)         for p > 1 - cooldown
    factor(p) = 1                                                 in between

Recommendation: Use WarmupStableDecay if you pre-train and may extend the budget.
When to use:
- Pre-training with a budget that may be extended.
- Model growth, which needs a high rate at the growth.
When not to use:
- Runs that are judged, or checkpoints that are chosen, before the cooldown: they look bad until then.
- A known, short horizon: a longer cooldown (0.4 to 0.6) or a linear decay from the start is at least as good.
Differences from the paper: None.
Reference: Haegele et al. (2024), Scaling laws and compute-optimal training beyond fixed training durations,
https://arxiv.org/abs/2405.18392: with a cooldown of 20 % and this shape, equal to a cosine of the same length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Technique


def warmup_stable_decay(progress: float, *, warmup: float = 0.05, cooldown: float = 0.2) -> float:
    """Return the factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    remaining = 1 - progress
    return 1 - math.sqrt(1 - remaining / cooldown) if remaining < cooldown else 1.0


@dataclass(eq=False)
class WarmupStableDecay(Technique):
    """Raise the learning rate, keep it constant, and cool it down to zero.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        cooldown: Share of the budget, in (0, 1], in which it falls; with ``warmup`` at most 1.
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05  # not taken from a paper
    cooldown: Annotated[float, at.Interval(gt=0, le=1)] = 0.2  # Haegele et al.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"{self!r}: warmup + cooldown must be <= 1. Shorten one.")

    def schedule(self, progress: float) -> float:
        return warmup_stable_decay(progress, warmup=self.warmup, cooldown=self.cooldown)
