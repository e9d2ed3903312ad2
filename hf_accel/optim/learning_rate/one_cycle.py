"""Raise the learning rate to a high peak for a third of the budget, then lower it to zero.

A rate that is too high at the start is bearable in the middle, where it regularizes.  The momentum is low while the
rate is high.  With nearness(p) on half cosine waves, from 0 at p = 0 to 1 at p = warmup and back to 0 at p = 1,

    factor(p)   = initial + (1 - initial) * nearness(p)           for p < warmup
    factor(p)   = final + (1 - final) * nearness(p)               else
    momentum(p) = 0.95 - 0.1 * nearness(p)

The schedule sets the momentum of the optimizer's groups, or the first of their betas.  It overrides ``adam_beta1`` and
the rule "sde" of ``LearningRateScaling``.

Recommendation: Use OneCycle if you train a convolutional network with SGD and found the peak learning rate by a range
test.
When to use: Convolutional networks with SGD and a peak learning rate found by a range test; fewer epochs are reported.
When not to use:
- Fine-tuning and pre-training of transformers, for which shorter warm-ups are usual.
- A peak learning rate that was tuned for another schedule.
Defaults: Those of ``torch.optim.lr_scheduler.OneCycleLR``, except for an end at 0.
Differences from the paper: As in fast.ai and OneCycleLR, half cosine waves replace straight lines.  The descent and the
last phase, far below the initial rate, are one.  ``LinearToZero(warmup=0.3)`` has straight lines and a constant
momentum.
References: Smith (2018), A disciplined approach to neural network hyper-parameters, https://arxiv.org/abs/1803.09820;
Smith and Topin (2018), Super-convergence, https://arxiv.org/abs/1708.07120.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at

from hf_accel.technique import Fraction, Technique

LOW, HIGH = 0.85, 0.95
"""Smith's momentum at the peak of the learning rate, and at its ends."""


def nearness(progress: float, *, warmup: float) -> float:
    """Return how near the peak is: 1 at ``warmup``, 0 at both ends."""
    far = 1 - progress / warmup if progress < warmup else (progress - warmup) / (1 - warmup)
    return (1 + math.cos(math.pi * far)) / 2


def one_cycle(progress: float, *, warmup: float = 0.3, initial: float = 0.04, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate."""
    end = initial if progress < warmup else final
    return end + (1 - end) * nearness(progress, warmup=warmup)


def cycled_momentum(progress: float, *, warmup: float = 0.3) -> float:
    """Return the momentum, which is low while the learning rate is high."""
    return HIGH - (HIGH - LOW) * nearness(progress, warmup=warmup)


@dataclass(eq=False)
class OneCycle(Technique):
    """Raise and lower the learning rate on half cosine waves, and the momentum the other way round.

    Args:
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        initial: Learning rate at the start, as a share of the peak, in [0, 1].
        final: Learning rate at the end, as a share of the peak, in [0, 1].
        cycle_momentum: True if the momentum changes, too.
    """

    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.3  # torch's pct_start
    initial: Fraction = 0.04  # torch's 1 / div_factor
    final: Fraction = 0.0  # torch has 4e-6
    cycle_momentum: bool = True
    variations: ClassVar = {"final": 0.1}

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        for group in optimizer.param_groups if self.cycle_momentum else ():
            if not {"betas", "momentum"} & group.keys():
                raise ValueError(
                    f"{self!r} does not support an optimizer that has neither momentum nor betas. "
                    "Set cycle_momentum=False."
                )

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if not self.cycle_momentum:
            return
        momentum = cycled_momentum(self.progress(state), warmup=self.warmup)
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum

    def schedule(self, progress: float) -> float:
        return one_cycle(progress, warmup=self.warmup, initial=self.initial, final=self.final)
