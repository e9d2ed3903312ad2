"""REX: the learning rate stays high for most of the budget, and falls ever faster toward zero.

With z, the share of the decay that is left,

    factor(p) = p / warmup                                                for p < warmup
    factor(p) = z / (1/2 + z/2),  z = (1 - p) / (1 - warmup)              else

Half-way through the decay the factor is 2/3, where that of a straight line is 1/2; at the end it falls twice as fast.

Reference: Chen et al. (2022), REX: Revisiting budgeted training with an improved schedule,
https://arxiv.org/abs/2107.04197; they report it above linear at low budgets, and level with the best at high ones.
Departure: a warm-up comes first, as in the other shapes; ``warmup=0`` is the paper's.

When to use: instead of a linear decay, where the budget is far below what the model could use.
When not to use: where the peak learning rate is near the highest that is stable; where a linear decay was tuned: the
mean rate of REX is higher by 23 % (2 - 2 ln 2 = 0.61 of the peak to 0.5), so that the peak wants tuning anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Technique


def rex(progress: float, *, warmup: float = 0.05) -> float:
    """Factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup)
    return left / (0.5 + left / 2)


@dataclass(eq=False)
class REX(Technique):
    """The learning rate rises to its peak, then falls slowly at first and fast at the end, to zero.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05

    def schedule(self, progress: float) -> float:
        return rex(progress, warmup=self.warmup)
