"""Double the batch whenever the measured gradient noise scale has outgrown it.

The noise scale B_simple = tr(Sigma) / |G|^2 (see `GradientNoiseScale`) is the batch that has as much noise as signal.
It is small at first and grows while the loss falls.  So small steps are best early, and large ones late.  With the
measured value,

    B = batch_size * 2^k,    k the whole number nearest to log2(B_simple / batch_size), at least 0, at most log2(factor)

B is the largest of these so far: the batch never shrinks, and has few sizes.  It starts with the nominal size, which is
the smallest.  The learning rate stays that of the schedule.  Give the budget in epochs, samples or tokens: a budget of
steps would be spent on more examples.

Recommendation: Use NoiseScaleRamp if many devices idle in small steps and you do not know when to grow the batch.
When to use: Many devices that idle in small steps, if you do not know beforehand when to grow the batch.
When not to use:
- One saturated GPU, because larger steps take proportionally longer.
- Adam, before you look at the report of `GradientNoiseScale`: the value may be off by an order.
- Runs that must not depend on the size of a micro-batch, because the measurement depends on it.
Defaults: The values are not taken from a paper.
Differences from the paper: The batch is a power of 2 times the nominal size, and never shrinks.  The learning rate
stays that of the schedule.
Reference: McCandlish et al. (2018), An Empirical Model of Large-Batch Training, https://arxiv.org/abs/1812.06162,
section 5 on adaptive batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
from torch import Tensor

from hf_accel.technique import Positive
from hf_accel.updates.noise_scale import NoiseScaleMeasurement

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

MIN_MEASUREMENTS = 10
"""Number of measurements before the batch may grow."""


def doublings(noise_scale: float, batch_size: int, factor: int) -> int:
    """Return how often to double the batch to come near the noise scale, and not beyond ``factor``."""
    return min(round(math.log2(max(noise_scale / batch_size, 1.0))), math.floor(math.log2(factor)))


@dataclass(eq=False)
class NoiseScaleRamp(NoiseScaleMeasurement):
    """Grow the batch with the gradient noise scale.

    Args:
        half_life: Steps after which a measurement counts half, above 0.
        factor: Largest batch as a multiple of the nominal one, at least 1, rounded down to a power of 2.
    """

    half_life: Positive = 50
    factor: Annotated[int, at.Ge(1)] = 8
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"half_life": 1.0, "factor": 1}
    counters: ClassVar = (*NoiseScaleMeasurement.counters, "doublings", "steps", "examples")
    expected_failed_checks: ClassVar = {
        "check_micro_batch_invariant": "the measurement uses micro-batches, and a step with only one raises an error"
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.doublings_, self.steps_, self.examples_ = 0, 0, 0

    def _cannot_measure(self, sentence: str) -> None:
        raise ValueError(sentence)

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """Return the nominal size, doubled as often as the largest measurement so far asked for."""
        value = self.noise_scale() if self.doublings_ < math.log2(self.factor) else None
        if value is not None and math.isfinite(value) and self.means_[2] >= MIN_MEASUREMENTS:
            self.doublings_ = max(self.doublings_, doublings(value, batch_size, self.factor))
        return batch_size * 2**self.doublings_

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count the trained steps and examples."""
        self.steps_ += 1
        self.examples_ += batch.num_examples
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the measurements, and the mean and the last number of examples of a step."""
        last = self.run_.nominal_batch_size * 2**self.doublings_  # type: ignore[union-attr]
        return {**super().report(), "mean_batch": self.examples_ / max(self.steps_, 1), "last_batch": last}
