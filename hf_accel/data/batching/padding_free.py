"""Lay the examples of a micro-batch end to end in one row, without padding.

A padded micro-batch of B examples costs B * max(length) positions, a flattened one sum(length).  The row

    input_ids     a0 a1 a2 b0 b1                      (1, T),  T = sum of the lengths
    position_ids   0  1  2  0  1
    labels      -100 a1 a2 -100 b1                    no example predicts the first token of the next

gives the same loss and gradient as the padded batch if nothing crosses from one example to the next.  Crossing depends
on the model and its attention implementation, and raises no error.  A trial before training therefore checks the model:
changing the first of two flattened examples must not change the outputs of the second.  Both must have the outputs that
they have alone.  Encoders such as BERT and RoBERTa get a mask that keeps the examples apart.

Recommendation: Use PaddingFree if you train on examples of different length with flash attention or on CPUs.
When to use: Decoders on examples of different length, with flash attention or on CPUs.  Flash attention visits each
example by itself; on CPUs we do so for ``sdpa``.  Up to twice the tokens per second are reported on FLAN, less for
similar lengths.  On one CPU thread, a small Llama trained on batches of 32 examples.  It processed 3.1 times the real
tokens per second of padding on sst2, and 2.0 times as many on gsm8k.
When not to use:
- Rows of equal length.
- Long micro-batches of encoders, with ``eager`` attention, or with ``sdpa`` on an accelerator.  Their mask makes them
  compute T * T scores, so attention costs more than with padding.
- Models with recurrent state, classification of whole sequences, and decoders that build their mask without
  position_ids: it does not support them.
Differences from the paper: Unlike the flattening collator of transformers, the user's own collator makes each example.
Labels are therefore those of padded training.  Models that would mix examples raise an error.
References: Kundu et al. (2024), https://arxiv.org/abs/2407.09105.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from hf_accel.features.flattening import CAUSAL, Layout, end_to_end, stop_telling_apart, tell_apart, unpadded
from hf_accel.features.flattening_trial import check_kept_apart
from hf_accel.features.segment_attention import attend_as_before, attend_by_segment, can_attend_by_segment
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def flatten(examples: Sequence[Mapping[str, Tensor]], asking: Technique, layout: Layout = CAUSAL) -> dict[str, Tensor]:
    """Join examples, rows (1, L) each, to one row (1, T); positions that an ``attention_mask`` hides are dropped."""
    return end_to_end(unpadded(examples, asking, layout))


@dataclass(eq=False)
class PaddingFree(Technique):
    """Train on flattened micro-batches, without padding."""

    fidelity: ClassVar = "exact"
    layout_: ClassVar[Layout] = CAUSAL
    rank_counters: ClassVar = ("tokens", "padded")

    def prepare_model(self, model: Any) -> nn.Module:
        """Try whether the model keeps flattened examples apart."""
        self.layout_ = check_kept_apart(model, self)  # type: ignore[misc]
        self.by_segment_ = can_attend_by_segment(model, run=self.run_)
        return model

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.by_segment_ and not args.torch_compile:
            attend_by_segment(model)
        if self.layout_.masked:
            tell_apart(model)
        self.tokens_, self.padded_ = 0, 0

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        attend_as_before(model)
        stop_telling_apart(model)

    def collate(self, features: Sequence[Mapping[str, Any]], collator: Callable) -> dict[str, Any]:
        """Flatten the examples, each as the collator makes it alone."""
        return flatten([collator([feature]) for feature in features], self, self.layout_)

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count the positions that padding would have added."""
        for micro in batch.micro_batches:
            positions_1L = micro.inputs["position_ids"]
            self.tokens_ += positions_1L.numel()
            self.padded_ += len(micro.ids_B) * (int(positions_1L.max()) + 1 - self.layout_.first)
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the share of positions that padded micro-batches would have spent on padding, on this rank."""
        return {"padding_avoided": 1 - self.tokens_ / max(self.padded_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["padding_avoided"] > 0
