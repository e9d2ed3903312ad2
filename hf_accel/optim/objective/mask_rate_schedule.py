"""Mask many tokens of a masked language model's texts at first, and fewer later.

Many masks give many predictions per text, few leave the text whole; a run profits from both, in this order:

    rate(p) = start + (end - start) * p        at progress p

Every token except special ones is drawn with this chance.  A drawn token becomes the mask token with 80 %, and another
token of the vocabulary with 10 %; otherwise it stays.  Its label is the token itself, and no other token has a label.

The draws are keyed by seed, epoch and example.  So ranks, workers and micro-batches change nothing, and a resumed run
continues with the same masks.  Masks from the collator are undone first.  An ordinary
``DataCollatorForLanguageModeling`` can stay, and evaluation keeps its masks and their rate.

Recommendation: Use MaskRateSchedule if you pre-train an encoder by masked language modeling.
When to use: Pre-training of encoders.  The authors report 0.46 points on GLUE for BERT-base over a constant rate, or
the same quality 1.89 times as fast.
When not to use:
- Without a comparison: a constant rate of 0.3 (``start`` = ``end``) is the rival to beat.
- Fine-tuning of a few hundred steps.
- Masks of whole words or spans, which it would undo.
Differences from the paper: None.
Reference: Ankner et al. (2024), Dynamic Masking Rate Schedules for MLM Pretraining, https://arxiv.org/abs/2305.15096.
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
    """Return inputs with masks, and labels at the masks.

    Args:
        ids_RL: Tokens of the whole text.
        maskable_RL: True at positions that may be masked.
        examples_RL: Index from 0 of the example that each position belongs to.
        drawn: Random generator of each example.
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
    """Mask a share of the tokens that changes linearly in progress.

    Args:
        start: Share of the tokens to mask at the start, in (0, 1).
        end: Share of the tokens to mask at the end, in (0, 1).
    """

    start: Rate = 0.3  # the paper's
    end: Rate = 0.15  # the paper's
    modality: ClassVar = "masked text"
    rank_counters: ClassVar = ("masked", "maskable")

    def on_train_begin(self, args, state, control, model: Any = None, processing_class: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if kind_of(unwrapped(model)) != "masked LM":
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it is no masked language model. "
                "Remove MaskRateSchedule."
            )
        if getattr(run.data_collator, "whole_word_mask", False):
            raise ValueError(
                f"{self!r} does not support {type(run.data_collator).__name__} because the collator masks whole words, "
                "which MaskRateSchedule would undo. Remove one of the two."
            )
        tokenizer: Any = processing_class or getattr(run.data_collator, "tokenizer", None)
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(f"{self!r} needs a mask token. Pass a tokenizer that has one as processing_class=.")
        self.mask_id_, self.vocabulary_ = tokenizer.mask_token_id, len(tokenizer)
        self.special_ids_ = torch.tensor(tokenizer.all_special_ids)
        self.masked_, self.maskable_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Mask each text at the current rate."""
        run: Any = self.run_
        rate = self.start + (self.end - self.start) * run.clock.progress
        micros = [self._masked(micro, rate, generators(self, batch.plan, micro)) for micro in batch.micro_batches]
        return dataclasses.replace(batch, micro_batches=micros)

    def _masked(self, micro: MicroBatch, rate: float, drawn: list[np.random.Generator]) -> MicroBatch:
        ids_RL = micro.inputs["input_ids"]
        if (labels_RL := micro.inputs.get("labels")) is not None:
            ids_RL = torch.where(labels_RL != IGNORED, labels_RL, ids_RL)  # undo the collator's masks
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
        """Report this rank's share of masked tokens, the mean over the run."""
        return {"masked": self.masked_ / max(self.maskable_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["masked"] > 0
