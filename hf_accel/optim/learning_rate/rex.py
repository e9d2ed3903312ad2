"""Keep the learning rate high for most of the budget, and let it fall ever faster toward zero.

A high learning rate moves fast but jitters, so the decay comes late.  With z, the share of the decay that
is left,

    factor(p) = p / warmup                                                for p < warmup
    factor(p) = z / (1/2 + z/2),  z = (1 - p) / (1 - warmup)              else

Half-way through the decay the factor is 2/3; that of a straight line is 1/2.  At the end it falls twice as fast.

Recommendation: Use REX if your budget is far below what the model could use.
When to use: Instead of a linear decay, if the budget is far below what the model could use.  The authors report it
above linear at low budgets, and level with the best at high ones.
When not to use:
- A peak learning rate near the highest stable one.
- A peak that was tuned for a linear decay.  The mean rate of REX is higher by 23 % (2 - 2 ln 2 = 0.61 of the peak to
  0.5), so tune the peak again.
Differences from the paper: A warm-up comes first, as in the other schedules; ``warmup=0`` is the paper's.
Reference: Chen et al. (2022), REX: Revisiting budgeted training with an improved schedule,
https://arxiv.org/abs/2107.04197.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from hf_accel.technique import Technique


def rex(progress: float, *, warmup: float = 0.05) -> float:
    """Return the factor on the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup)
    return left / (0.5 + left / 2)


@dataclass(eq=False)
class REX(Technique):
    """Raise the learning rate to its peak, then lower it to zero, slowly at first and fast at the end.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05  # not taken from a paper

    def schedule(self, progress: float) -> float:
        return rex(progress, warmup=self.warmup)
