"""Base class of techniques that project few positions to the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from hf_accel.losses import IGNORED
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


class PartialProjection(Technique):
    """Count the positions of a batch, and those with a label, which alone are projected."""

    fidelity: ClassVar = "exact"
    rank_counters: ClassVar = ("positions", "projected")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.positions_, self.projected_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count positions, and those with a label."""
        for micro in batch.micro_batches:
            self.positions_ += micro.inputs["labels"].numel()
            self.projected_ += int(micro.inputs["labels"].ne(IGNORED).sum())
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the share of positions that were projected to the vocabulary, on this rank."""
        return {"projected": self.projected_ / self.positions_ if self.positions_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["projected"] < 1
