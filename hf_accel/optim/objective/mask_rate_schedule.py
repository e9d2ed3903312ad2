"""MaskRateSchedule: mask many tokens of a masked language model's texts at first, and fewer later.

Many masks give many predictions a text, few leave the text whole; a run profits from both, in this order:

    rate(p) = start + (end - start) * p        at progress p

Every token that is no special one is drawn with this chance.  Of those drawn, 80 % become the mask token, 10 % another
token of the vocabulary, and 10 % stay; their labels are the tokens themselves, and nothing else has a label.  The draws
are keyed by seed, epoch and example, so that neither ranks, workers nor micro-batches change anything, and a resumed
run goes on with the same masks.

Masks that the collator has set are undone first.  An ordinary ``DataCollatorForLanguageModeling`` can stay, and
evaluation keeps its masks and their rate.

Reference: Ankner et al. (2024), Dynamic Masking Rate Schedules for MLM Pretraining, https://arxiv.org/abs/2305.15096.

When to use: pre-training of encoders; the authors report 0.46 points on GLUE for BERT-base over a constant rate, or the
same quality 1.89 times as fast.  A constant rate of 0.3 (``start`` = ``end``) is the rival that it has to beat.
When not to use: fine-tuning of a few hundred steps; masks of whole words or spans, which it would undo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
from torch import Tensor

from hf_accel.adapters import unwrapped
from hf_accel.features.augmentation import generators
from hf_accel.losses import IGNORED, examples_of, kind_of
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import MicroBatch, StepBatch

Rate = Annotated[float, at.Interval(gt=0, lt=1)]


def draw_masks(
    ids_RL: Tensor,
    maskable_RL: Tensor,
    examples_RL: Tensor,
    rate: float,
    drawn: Sequence[np.random.Generator],
    mask_id: int,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Inputs with masks, and labels where there are masks.

    Args:
        ids_RL: the whole text.
        maskable_RL: which positions may be masked.
        examples_RL: which example each position belongs to, from 0.
        drawn: a generator for each example.
    """
    masked_RL, labels_RL = ids_RL.clone(), torch.full_like(ids_RL, IGNORED)
    for example, generator in enumerate(drawn):
        places = (maskable_RL & (examples_RL == example)).flatten().nonzero().flatten()
        chances = generator.random((2, len(places)))
        others = torch.from_numpy(generator.integers(vocabulary, size=len(places)))
        chosen, kind = chances[0] < rate, torch.from_numpy(chances[1])
        old = ids_RL.flatten()[places]
        new = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, others, old))
        chosen = torch.from_numpy(chosen)
        labels_RL.view(-1)[places[chosen]] = old[chosen]
        masked_RL.view(-1)[places[chosen]] = new[chosen].to(ids_RL.dtype)
    return masked_RL, labels_RL


@dataclass(eq=False)
class MaskRateSchedule(Technique):
    """Masks a share of the tokens that changes, linearly in progress.

    Args:
        start: Share of the tokens that is masked at the start, in (0, 1).
        end: The same at the end.
    """

    start: Rate = 0.3  # the paper's
    end: Rate = 0.15
    modality: ClassVar = "masked text"
    rank_counters: ClassVar = ("masked", "maskable")

    def on_train_begin(self, args, state, control, model: Any = None, processing_class: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if kind_of(unwrapped(model)) != "masked LM":
            raise ValueError(f"{self!r}: {type(model).__name__} is no masked language model. Leave it out.")
        if getattr(run.data_collator, "whole_word_mask", False):
            raise ValueError(f"{self!r}: the collator masks whole words, which it would undo. Leave one of them out.")
        tokenizer: Any = processing_class or getattr(run.data_collator, "tokenizer", None)
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(f"{self!r}: no mask token is known. Give a tokenizer that has one as processing_class=.")
        self.mask_id_, self.vocabulary_ = tokenizer.mask_token_id, len(tokenizer)
        self.special_ids_ = torch.tensor(tokenizer.all_special_ids)
        self.masked_, self.maskable_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Each text with masks of the present rate."""
        run: Any = self.run_
        rate = self.start + (self.end - self.start) * run.clock.progress
        micros = [self._masked(micro, rate, generators(self, batch.plan, micro)) for micro in batch.micro_batches]
        return dataclasses.replace(batch, micro_batches=micros)

    def _masked(self, micro: MicroBatch, rate: float, drawn: list[np.random.Generator]) -> MicroBatch:
        ids_RL = micro.inputs["input_ids"]
        if (labels_RL := micro.inputs.get("labels")) is not None:
            ids_RL = torch.where(labels_RL != IGNORED, labels_RL, ids_RL)  # as before the collator's masks
        examples_RL = examples_of({**micro.inputs, "labels": ids_RL}, len(micro.ids_B))
        maskable_RL = ~torch.isin(ids_RL, self.special_ids_)
        if "attention_mask" in micro.inputs:
            maskable_RL &= micro.inputs["attention_mask"].bool()
        masked_RL, labels_RL = draw_masks(
            ids_RL, maskable_RL, examples_RL, rate, drawn, self.mask_id_, self.vocabulary_
        )
        self.masked_ += int((labels_RL != IGNORED).sum())
        self.maskable_ += int(maskable_RL.sum())
        return micro._replace(inputs={**micro.inputs, "input_ids": masked_RL, "labels": labels_RL})

    def report(self) -> Mapping[str, Any]:
        """The share of the tokens that was masked, the mean over the run, on this rank."""
        return {"masked": self.masked_ / max(self.maskable_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["masked"] > 0
