"""Padding-free batches: the examples of a micro-batch in one row, end to end, without padding.

A padded micro-batch of B examples costs B * max(length) positions, a flattened one sum(length).  The row

    input_ids     a0 a1 a2 b0 b1                      (1, T),  T = sum of the lengths
    position_ids   0  1  2  0  1
    labels      -100 a1 a2 -100 b1                    no example predicts the first token of the next

gives the same loss and gradient as the padded batch, if nothing crosses from one example to the next.  Whether it does
depends on the model and its attention implementation, and a crossing raises no error.  So we try it on the model before
training: changing the first of two flattened examples must not change the outputs of the second, and both must have the
outputs that they have alone.

Reference: Kundu et al. (2024), https://arxiv.org/abs/2407.09105.  Departures from the flattening collator of
transformers: the user's own collator makes each example, so the labels are those of padded training; models that would
mix examples are refused.

When to use: decoder language models on examples of different length, with flash attention, which visits each example on
its own, or on CPUs, where we do so for ``sdpa``; up to twice the tokens per second are reported on FLAN, less where
lengths are alike.  On one CPU thread a small Llama trained on 3.1 times the real tokens a second of batches of 32
padded examples of sst2, and 2.0 times as many of gsm8k.
When not to use: rows of equal length; long micro-batches with ``eager`` attention, or with ``sdpa`` on an accelerator,
whose mask makes them compute T * T scores, so that attention costs more than with padding.  Refused are encoders,
models with recurrent state, classification of sequences or tokens, and decoders that make their mask without
position_ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from hf_accel.features.flattening import (
    CAUSAL,
    Layout,
    check_kept_apart,
    end_to_end,
    stop_telling_apart,
    tell_apart,
    unpadded,
)
from hf_accel.features.segment_attention import attend_as_before, attend_by_segment, can_attend_by_segment
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def flatten(examples: Sequence[Mapping[str, Tensor]], asking: Technique, layout: Layout = CAUSAL) -> dict[str, Tensor]:
    """One row, (1, T), of examples that are rows (1, L) each; what an ``attention_mask`` hides is left out."""
    return end_to_end(unpadded(examples, asking, layout))


@dataclass(eq=False)
class PaddingFree(Technique):
    """Trains on flattened micro-batches of a causal language model, without padding."""

    fidelity: ClassVar = "exact"
    layout_: ClassVar[Layout] = CAUSAL
    rank_counters: ClassVar = ("tokens", "padded")

    def prepare_model(self, model: Any) -> nn.Module:
        """Try whether the model keeps flattened examples apart."""
        self.layout_ = check_kept_apart(model, self)
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
        """Each example as the collator makes it alone, end to end."""
        return flatten([collator([feature]) for feature in features], self, self.layout_)

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Counts the positions that padding would have added."""
        for micro in batch.micro_batches:
            positions_1L = micro.inputs["position_ids"]
            self.tokens_ += positions_1L.numel()
            self.padded_ += len(micro.ids_B) * (int(positions_1L.max()) + 1 - self.layout_.first)
        return batch

    def report(self) -> Mapping[str, Any]:
        """The share of positions that padded micro-batches would have spent on padding, on this rank."""
        return {"padding_avoided": 1 - self.tokens_ / max(self.padded_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["padding_avoided"] > 0
