"""Replace a random share of the tokens of each example by padding.

The meaning of a sentence seldom depends on one word.  A model that sees it with holes must use the rest:

    cut k = round(``share`` * min(p / ``ramp``, 1) * n) of an example's n inner tokens, at progress p

The id of a cut token becomes the padding token, and nothing attends to it.  Rows of several examples (`Packing`,
`PaddingFree`) get no mask, so there a cut token is only blank.  The first and the last token of an example stay,
because models read their answer there.  Labels stay, too: a language model still has to predict a cut token from those
before it.  Seed, epoch and example determine the tokens, so neither ranks nor micro-batches change anything.

Recommendation: Use TokenCutoff if you fine-tune an encoder on a small text set.
When to use: Fine-tuning of encoders on small sets.  The authors report gains over RoBERTa on GLUE, with their
consistency term.
When not to use: Tasks with single tokens as the answer (tagging, copying, code), large sets seen once, and models with
tokens that stand for images.
Differences from the paper:
- Each example has one cut view, without the term that makes several views agree.
- The strength may rise.
- Models that number positions by non-padding tokens, such as RoBERTa, close the gaps.
References: Shen et al. (2020), A Simple but Tough-to-Beat Data Augmentation Approach for Natural Language Understanding
and Generation, https://arxiv.org/abs/2009.13818.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
from torch import Tensor

from hf_accel.features.augmentation import generators, strength
from hf_accel.features.choices import folded
from hf_accel.features.truncation import refuse_media_tokens
from hf_accel.losses import examples_of
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def draw_cuts(texts_RL: Tensor, seen_RL: Tensor, share: float, drawn: list[np.random.Generator]) -> Tensor:
    """Draw the positions to cut, (R, L): some of each text, between its first and its last token.

    Args:
        texts_RL: Text of each position, from 0: an example, or one of its choices.
        seen_RL: True for tokens, False for padding.
        drawn: A generator for each text.
    """
    cut_RL = torch.zeros_like(seen_RL)
    for text, generator in enumerate(drawn):
        inner = (seen_RL & (texts_RL == text)).flatten().nonzero().flatten()[1:-1]
        chosen = generator.permutation(len(inner))[: round(share * len(inner))]
        cut_RL.view(-1)[inner[torch.from_numpy(chosen)]] = True
    return cut_RL


@dataclass(eq=False)
class TokenCutoff(Technique):
    """Train on examples with holes.

    Args:
        share: Share of an example's tokens to cut, in [0, 1).
        ramp: Progress, in [0, 1], until which the share rises linearly from 0; 0: full from the start.
    """

    share: Annotated[float, at.Interval(ge=0, lt=1)] = 0.1  # the paper tunes it for each task
    ramp: Fraction = 0.0  # no ramp, as in the paper
    neutral: ClassVar = {"share": 0.0}
    rank_counters: ClassVar = ("cut", "seen")

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if (name := getattr(model, "main_input_name", None)) != "input_ids":
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it reads {name}, not input_ids. "
                "Remove TokenCutoff."
            )
        refuse_media_tokens(self, model)
        pad_ids = [getattr(owner, "pad_token_id", None) for owner in (processing_class, model.config)]
        self.pad_id_ = next((i for i in pad_ids if i is not None), None)
        if self.pad_id_ is None:
            raise ValueError(f"{self!r} needs a padding token to cut with. Set config.pad_token_id.")
        self.cut_, self.seen_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Cut a share of the tokens of each example."""
        share = self.share * strength(self)
        micros = []
        for micro in batch.micro_batches:
            ids_RL = micro.inputs.get("input_ids")
            if ids_RL is None:
                raise ValueError(
                    f"{self!r} needs input_ids in the batch ({', '.join(micro.inputs)}). Remove TokenCutoff."
                )
            seen_RL = micro.inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
            if seen_RL.shape != ids_RL.shape:
                raise ValueError(
                    f"{self!r} does not support an attention_mask of shape {tuple(seen_RL.shape)} because it does not "
                    f"mark the tokens of input_ids of shape {tuple(ids_RL.shape)}. Remove TokenCutoff."
                )
            if len(ids_RL) != len(micro.ids_B) and "position_ids" not in micro.inputs:
                raise ValueError(
                    f"{self!r} does not support {len(ids_RL)} rows for {len(micro.ids_B)} examples without "
                    "position_ids. Remove TokenCutoff."
                )
            self.seen_ += int(seen_RL.sum())
            if share > 0:
                assert self.pad_id_ is not None
                drawn = generators(self, batch.plan, micro)
                cut = self._cuts(micro.inputs, seen_RL, share, drawn).view_as(ids_RL)
                inputs = {**micro.inputs, "input_ids": ids_RL.masked_fill(cut, self.pad_id_)}
                if "attention_mask" in inputs:
                    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(cut, 0)
                elif len(ids_RL) == len(micro.ids_B):  # each row is an example
                    inputs["attention_mask"] = (~cut).to(ids_RL.dtype)
                micro = micro._replace(inputs=inputs)
                self.cut_ += int(cut.sum())
            micros.append(micro)
        return dataclasses.replace(batch, micro_batches=micros)

    def _cuts(self, inputs: Mapping[str, Tensor], seen: Tensor, share: float, drawn: list) -> Tensor:
        """Draw the cuts of each row; the choices of an example share its generator."""
        rows = folded(inputs)
        choices = len(rows["input_ids"]) // len(seen)
        texts = [generator for generator in drawn for _ in range(choices)]
        texts_RL = examples_of({**rows, "labels": rows["input_ids"]}, len(texts))
        return draw_cuts(texts_RL, seen.view_as(rows["input_ids"]), share, texts)

    def report(self) -> Mapping[str, Any]:
        """Report the share of the tokens that was cut, on this rank."""
        return {"cut": self.cut_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["cut"] > 0
