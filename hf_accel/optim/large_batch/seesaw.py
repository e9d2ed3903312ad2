"""Divide the learning rate by sqrt(2) and double the batch at each point where the schedule halves the rate.

A decay of the learning rate removes the noise of the gradient from the weights.  A larger batch has less noise to begin
with, and needs fewer steps for the same examples.  The schedule's value s(p) falls from 1 to 0 after the warm-up.  With
k = floor(log2(1 / s)), at most log2(factor),

    B(p)  = batch_size * 2^k
    lr(p) = peak * 2^(-k / 2)                   while k < log2(factor)
            peak * 2^(-k / 2) * 2^k * s(p)      when the batch grows no more: the schedule continues

As long as the noise dominates the gradient, the loss of normalized SGD follows the same path as under the schedule.
For Adam this holds approximately.  FLOPs stay the same; of N / batch_size serial steps, a linear decay with ``factor``
8 leaves 67 %.  Give the budget in epochs, samples or tokens: a budget of steps would be spent on more examples.

Recommendation: Use Seesaw if you pre-train data-parallel with Adam and your devices idle at the nominal batch size.
When to use: Data-parallel pre-training with Adam, on devices that idle at the nominal batch.  The noise scale has to be
near that batch (`GradientNoiseScale`).
When not to use:
- One saturated GPU, because larger steps take proportionally longer.
- Plain SGD, for which the batch may double without the factor sqrt(2).
- Fine-tuning.
Defaults: A cosine is the paper's schedule.  The other values are not taken from a paper.
Differences from the paper:
- The batch has a largest size, and from there on the schedule continues.
- The schedule follows progress instead of steps.
Reference: Meterez et al. (2025), Seesaw, https://arxiv.org/abs/2510.14717 (36 % less time for 150M to 600M parameters,
in a setting in which a larger step takes no longer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types as at
from torch import Tensor

from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def decay(progress: float, *, warmup: float, shape: Literal["cosine", "linear"]) -> float:
    """Return the schedule's value: 1 before the end of the warm-up, then falling to 0."""
    share = max(progress - warmup, 0.0) / (1 - warmup)
    return 1 - share if shape == "linear" else (1 + math.cos(math.pi * share)) / 2


def seesaw(value: float, max_doublings: int) -> tuple[float, int]:
    """Return the factor on the peak rate and the number of doublings of the batch at a ``value`` of the schedule."""
    doublings = min(math.floor(-math.log2(value)), max_doublings) if value > 0 else max_doublings
    rest = 1.0 if doublings < max_doublings else value * 2**doublings
    return 2 ** (-doublings / 2) * rest, doublings


@dataclass(eq=False)
class Seesaw(Technique):
    """Trade the decay of the learning rate for larger steps.

    Args:
        factor: Largest batch as a multiple of the nominal one, at least 1, rounded down to a power of 2.
        warmup: Share of the budget, in [0, 1), in which the learning rate rises.
        shape: Schedule with the decay that is traded: ``"cosine"`` or ``"linear"``, both to zero.
    """

    factor: Annotated[int, at.Ge(1)] = 8
    warmup: Annotated[float, at.Interval(ge=0, lt=1)] = 0.05
    shape: Literal["cosine", "linear"] = "cosine"
    counters: ClassVar = ("steps", "examples", "largest")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.steps_, self.examples_, self.largest_ = 0, 0, 0

    def _now(self, progress: float) -> tuple[float, int]:
        value = decay(progress, warmup=self.warmup, shape=self.shape)
        return seesaw(value, math.floor(math.log2(self.factor)))

    def schedule(self, progress: float) -> float:
        return progress / self.warmup if progress < self.warmup else self._now(progress)[0]

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """Return the batch size at the current progress, over all ranks."""
        assert self.run_ is not None
        return batch_size * 2 ** self._now(self.run_.clock.progress)[1]

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count the trained steps and examples."""
        self.steps_ += 1
        self.examples_ += batch.num_examples
        self.largest_ = max(self.largest_, batch.num_examples)
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the mean and the largest number of examples of a step."""
        return {"mean_batch": self.examples_ / max(self.steps_, 1), "largest_batch": self.largest_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["largest_batch"] > report["mean_batch"]
