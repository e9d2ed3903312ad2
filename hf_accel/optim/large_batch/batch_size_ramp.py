"""Start with small step batches, and grow them to the nominal batch size.

Early gradients are large against their noise, so a small batch shows the direction as well as a large one:

    B(p) = batch_size * (start + (1 - start) * min(p / end, 1))            shape "linear"
    B(p) = batch_size * min(start * 2^floor(n * p / end), 1)               shape "doubling",  n = ceil(log2(1 / start))

B is rounded down to whole examples, at least one, which the ranks share out.  The cost of a step per example does not
change.  So FLOPs fall only because fewer examples are spent where they teach little.  The certain saving is *serial
steps* against a run of small batches: with many devices, a large step takes no longer than a small one.

Recommendation: Use BatchSizeRamp if you pre-train data-parallel with a nominal batch near the critical one.
When to use: Data-parallel pre-training with a nominal batch near the critical one.  If devices idle in small steps,
gains of up to a third in wall-clock time are reported.
When not to use:
- One saturated GPU, because the same FLOPs take the same time; record runs gained 1 to 2 %.
- Short fine-tuning.  There, the smallest batch that fills the device is the better choice for the whole run.
Differences from the paper: The ramp follows progress instead of a count of tokens.  The learning rate stays that of the
schedule, because the warm-up covers most of the ramp.
References: Smith et al. (2018), Don't decay the learning rate, increase the batch size,
https://arxiv.org/abs/1711.00489; Merrill et al. (2025), https://arxiv.org/abs/2505.23971 (43 % fewer steps, OLMo 1B).
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


def ramped_batch_size(
    progress: float,
    batch_size: int,
    *,
    start: float,
    end: float,
    shape: Literal["linear", "doubling"] = "linear",
) -> int:
    """Return the examples of a step at ``progress``: never falling, and ``batch_size`` from ``end`` on."""
    if progress >= end:
        return batch_size
    if shape == "linear":
        share = start + (1 - start) * progress / end
    else:
        share = min(start * 2 ** math.floor(math.ceil(math.log2(1 / start)) * progress / end), 1.0)
    return max(int(batch_size * share), 1)


@dataclass(eq=False)
class BatchSizeRamp(Technique):
    """Grow the number of examples of a step from a share of the nominal batch size to the whole.

    Args:
        start: First batch size as a share of the nominal one, in (0, 1].
        end: Progress, in (0, 1], at which the nominal batch size is reached.
        shape: ``"linear"`` in progress, or ``"doubling"`` in stages of equal length (fewer shapes to compile).
    """

    start: Annotated[float, at.Interval(gt=0, le=1)] = 0.25  # evidence: a quarter of the best batch size
    end: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # between Cramming's 60 % of the budget and OLMo's doublings
    shape: Literal["linear", "doubling"] = "linear"  # not taken from a paper
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"start": 1.0}
    counters: ClassVar = ("steps", "examples", "first")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.steps_, self.examples_, self.first_ = 0, 0, 0

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """Return the batch size at the current progress, over all ranks."""
        assert self.run_ is not None
        progress = self.run_.clock.progress
        return ramped_batch_size(progress, batch_size, start=self.start, end=self.end, shape=self.shape)

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count the trained examples; `batch` cannot, because loader workers call it ahead of training."""
        self.steps_ += 1
        self.examples_ += batch.num_examples
        self.first_ = self.first_ or batch.num_examples
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the first and the mean number of examples of a step."""
        return {"first_batch": self.first_, "mean_batch": self.examples_ / max(self.steps_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["first_batch"] < report["mean_batch"]
