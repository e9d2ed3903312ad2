"""Sequence-length warm-up: begin with the first tokens of each example, and lengthen.

Early in training a model learns what short contexts teach.  Short rows cost less than their share, as attention grows
with the square of the length, and they keep early steps stable under a large learning rate:

    length(p) = L * (start + (1 - start) * p / end)    for p < end, rounded up to ``multiple``;    L from then on

L is `max_length` or the length of the longest example of the training set, so that no row depends on the micro-batch
that it is in.

Reference: Li et al. (2022), The stability-efficiency dilemma, https://arxiv.org/abs/2108.06084.  Departures: progress
in place of steps, so that under a budget of time the saved time is spent on more steps; the first length is a share of
the full one.

When to use: pre-training on long rows; about 1.5 times faster on GPT-2 125M with 30 % of the steps in warm-up.
When not to use: where what counts stands at the end of an example, as the answers of chats do; one epoch over scarce
data, as what is cut off is not seen again; with static-shape compilation, unless ``multiple`` is large.  With flash
attention and rows below about 2000 tokens a token costs the same at any length: then it only reorders the tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.data.lengths import example_lengths
from hf_accel.technique import State, Technique

if TYPE_CHECKING:
    from hf_accel.stream import StepBatch


def warmed_up_length(progress: float, full_length: int, *, start: float, end: float, multiple: int) -> int:
    """Tokens of an example that are trained on at ``progress``; never falling."""
    if progress >= end:
        return full_length
    length = full_length * (start + (1 - start) * progress / end)
    return min(math.ceil(length / multiple) * multiple, full_length)


def truncate(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The first ``length`` tokens of each example, in every tensor that begins with the shape of ``input_ids``.

    Padding on the left stays there; examples that are packed (with ``position_ids`` that begin anew within a row) are
    truncated one by one, and what is left of a row is moved to its left.  Where no label to predict would be left, the
    inputs stay whole.
    """
    ids_RL = inputs["input_ids"]
    mask_RL = inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
    if (kept_RL := _kept_of_packed(inputs, mask_RL, length)) is None:
        length = min(length, ids_RL.shape[1])
        first_R = mask_RL.long().argmax(1).clamp(max=ids_RL.shape[1] - length)
        columns_RL = first_R[:, None] + torch.arange(length)
    else:
        columns_RL = (~kept_RL).long().argsort(dim=1, stable=True)[:, : int(kept_RL.sum(1).max())]
    shorter = {
        name: value[torch.arange(len(ids_RL))[:, None], columns_RL] if value.shape[:2] == ids_RL.shape else value
        for name, value in inputs.items()
    }
    if kept_RL is not None:
        _refill(shorter, kept_RL.gather(1, columns_RL))
    labels = shorter.get("labels")
    if labels is not None and labels.dim() > 1 and labels[:, 1:].eq(-100).all():
        return dict(inputs)
    return shorter


def _kept_of_packed(inputs: Mapping[str, Tensor], mask_RL: Tensor, length: int) -> Tensor | None:
    """What packed rows keep; None where no row holds several examples."""
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or positions_RL.shape != mask_RL.shape:
        return None
    # Between the first and the last token, with those that are hidden within an example.
    used_RL = mask_RL.cummax(1).values & mask_RL.flip(1).cummax(1).values.flip(1)
    anew_RL = (positions_RL[:, 1:] <= positions_RL[:, :-1]) & used_RL[:, 1:] & used_RL[:, :-1]
    return (positions_RL < length) & used_RL if anew_RL.any() else None


def _refill(rows: dict[str, Tensor], kept_RL: Tensor) -> None:
    """Make padding, which goes on counting the positions, of what packed rows do not keep."""
    last_R1 = kept_RL.sum(1, keepdim=True) - 1
    positions_RL = rows["position_ids"]
    counted_RL = positions_RL.gather(1, last_R1) + torch.arange(kept_RL.shape[1]) - last_R1
    rows["position_ids"] = torch.where(kept_RL, positions_RL, counted_RL)
    if "attention_mask" in rows:
        rows["attention_mask"] = rows["attention_mask"] * kept_RL
    for name, fill in {"input_ids": 0, "labels": -100}.items():
        if name in rows:
            rows[name] = rows[name].masked_fill(~kept_RL, fill)


@dataclass(eq=False)
class SequenceLengthWarmup(Technique):
    """Trains on the beginnings of examples, longer and longer, until they are whole.

    Args:
        start: First length as a share of the longest example, in (0, 1].
        end: Progress, in (0, 1], from which examples are whole.
        multiple: Lengths are multiples of this number of tokens, at least 1.
        max_length: The full length in tokens, at least 1; None: that of the longest example.  Needed for a stream.
    """

    start: Annotated[float, at.Interval(gt=0, le=1)] = 0.25  # evidence: not below a quarter, else it overfits
    end: Annotated[float, at.Interval(gt=0, le=1)] = 0.3  # Composer's share of training
    multiple: Annotated[int, at.Ge(1)] = 8  # tensor cores; the paper's step
    max_length: Annotated[int, at.Ge(1)] | None = None
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"start": 1.0}
    variations: ClassVar = {"max_length": 16}

    def inspect_dataset(self, dataset: Any) -> None:
        """Find the longest example."""
        self.full_length_ = self.max_length or int(
            example_lengths(dataset, "input_ids", asking=self, remedy="Give max_length=.").max()
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{self!r}: {type(model).__name__} reads inputs and labels of different length. Leave it out."
            )
        self.trained_, self.read_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Every micro-batch at the present length."""
        assert self.host_ is not None
        ramp = {"start": self.start, "end": self.end, "multiple": self.multiple}
        length = warmed_up_length(self.host_.clock.progress, self.full_length_, **ramp)
        micros = batch.micro_batches
        self.read_ += sum(micro.inputs["input_ids"].numel() for micro in micros)
        if length < self.full_length_:
            micros = [micro._replace(inputs=truncate(micro.inputs, length)) for micro in micros]
        self.trained_ += sum(micro.inputs["input_ids"].numel() for micro in micros)
        return dataclasses.replace(batch, micro_batches=micros)

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        return {"trained": self.trained_, "read": self.read_} if scope == "rank" else {}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if scope == "rank":
            self.trained_, self.read_ = state["trained"], state["read"]

    def report(self) -> Mapping[str, Any]:
        """The share of the positions that was trained on, on this rank."""
        return {"positions": self.trained_ / self.read_ if self.read_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["positions"] < 1
