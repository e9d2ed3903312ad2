"""Noise-scale ramp: double the batch whenever the measured gradient noise scale has outgrown it.

The noise scale B_simple = tr(Sigma) / |G|^2 (see `GradientNoiseScale`) is the batch that has as much noise as
signal.  It is small at first and grows while the loss falls, so that small steps are the right ones early and large
ones late.  With the measured value,

    B = batch_size * 2^k,    k the whole number nearest to log2(B_simple / batch_size), at least 0, at most log2(factor)

and the largest so far: the batch never shrinks, and has few sizes.  It starts with the nominal size, which is the
smallest.  The learning rate stays that of the schedule.  Give the budget in epochs, samples or tokens: a budget of
steps would be spent on more examples.

Reference: McCandlish et al. (2018), An Empirical Model of Large-Batch Training, https://arxiv.org/abs/1812.06162,
section 5 on adaptive batches.

When to use: many devices that idle in small steps, where when to grow is not known beforehand.
When not to use: one saturated GPU, where larger steps take as much longer; Adam, without a look at what
`GradientNoiseScale` reports: the value may be off by an order. Results depend on the size of a micro-batch, through the
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
from torch import Tensor

from hf_accel.optim.large_batch.noise_scale import NoiseScaleMeasurement
from hf_accel.technique import Positive

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

MIN_MEASUREMENTS = 10
"""Measurements before the first of which the batch does not grow."""


def doublings(noise_scale: float, batch_size: int, factor: int) -> int:
    """How often the batch is doubled to come near the noise scale, and not beyond ``factor``."""
    return min(round(math.log2(max(noise_scale / batch_size, 1.0))), math.floor(math.log2(factor)))


@dataclass(eq=False)
class NoiseScaleRamp(NoiseScaleMeasurement):
    """Grows the batch with the gradient noise scale.

    Args:
        half_life: Steps after which a measurement counts half, above 0.
        factor: Largest batch as a multiple of the nominal one, at least 1; a power of 2 is reached.
    """

    half_life: Positive = 50
    factor: Annotated[int, at.Ge(1)] = 8
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"half_life": 1.0, "factor": 1}
    counters: ClassVar = (*NoiseScaleMeasurement.counters, "doublings", "steps", "examples")
    expected_failed_checks: ClassVar = {
        "check_micro_batch_invariant": "the measurement is made of micro-batches, and refused where a step has only one"
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.doublings_, self.steps_, self.examples_ = 0, 0, 0

    def _cannot_measure(self, sentence: str) -> None:
        raise ValueError(sentence)

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """The nominal size, doubled as often as was ever right."""
        value = self.noise_scale() if self.doublings_ < math.log2(self.factor) else None
        if value is not None and math.isfinite(value) and self.means_[2] >= MIN_MEASUREMENTS:
            self.doublings_ = max(self.doublings_, doublings(value, batch_size, self.factor))
        return batch_size * 2**self.doublings_

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Counts what is trained on."""
        self.steps_ += 1
        self.examples_ += batch.num_examples
        return batch

    def report(self) -> Mapping[str, Any]:
        """What was measured, and the mean and last number of examples of a step."""
        last = self.run_.nominal_batch_size * 2**self.doublings_  # type: ignore[union-attr]
        return {**super().report(), "mean_batch": self.examples_ / max(self.steps_, 1), "last_batch": last}
