"""Pack the examples of a micro-batch into few rows of one length, instead of padding one row for each.

Each example goes, longest first, into the fullest row that has room for it (best fit, decreasing).  Rows have
L = `max_length` positions.  R rows hold the B examples, where padding would take B rows:

    input_ids     a0 a1 a2 b0 b1  .                    (R, L)
    position_ids   0  1  2  0  1  2                    padding counts on; nothing attends to it
    labels      -100 a1 a2 -100 b1 -100                no example predicts the first token of the next

A step keeps its examples, its loss and its gradient if nothing crosses from one example to the next.  ``position_ids``
that restart tell the model where an example ends.  A trial before training checks that the model heeds them.  Widths
are fixed, so only R varies: at most B shapes to compile.  Attention computes R * L^2 scores, and on CPUs only the
scores within each example.  Flash attention looks for borders in a single row only, so its rows are laid end to end.

Recommendation: Use Packing if you train a decoder on examples of very different length with ``torch.compile``, or with
sdpa or eager attention on an accelerator.
When to use: Decoder language models on examples of very different length, with ``sdpa`` or ``eager`` attention on
accelerators or with ``torch.compile``.  Use large micro-batches, because few examples fill rows badly.  On one CPU
thread, a small Llama trained on batches of 32 examples.  It processed 3.2 times the real tokens per second of padding
on sst2, and 1.8 times as many on gsm8k.
When not to use:
- Flash attention and CPUs, where PaddingFree has no padding at all.
- Examples nearly as long as the longest, or one very long example, because every row is that long.
- Encoders, models with recurrent state, classification, and decoders that build their mask without position_ids: it
  does not support them.
Differences from the paper: Examples are packed within a micro-batch.  A step therefore has the same examples as without
packing, and no example is cut.
References: Krell et al. (2021), https://arxiv.org/abs/2107.02027; best fit: Ding et al. (2024),
https://arxiv.org/abs/2404.10830.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_accel.batch import ORDER
from hf_accel.features.flattening import CAUSAL, Layout, end_to_end, unpadded
from hf_accel.features.flattening_trial import check_kept_apart
from hf_accel.features.lengths import example_lengths
from hf_accel.features.segment_attention import attend_as_before, attend_by_segment, can_attend_by_segment
from hf_accel.host.internals import attention_of
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute indices over rows with lengths that add up to at most ``capacity``; no length may be larger."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r, free in enumerate(room) if free >= lengths[i]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(capacity)
        fullest = min(fitting, key=room.__getitem__)
        rows[fullest].append(i)
        room[fullest] -= lengths[i]
    return rows


def filled_up(row: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Pad a row (1, T) on the right to (1, ``width``), and hide the padding by an ``attention_mask``."""
    used = row["input_ids"].shape[1]
    fill = {"labels": -100}
    padded = {name: F.pad(value, (0, width - used), value=fill.get(name, 0)) for name, value in row.items()}
    positions_1L = padded["position_ids"]
    positions_1L[:, used:] = positions_1L[:, used - 1 : used] + torch.arange(1, width - used + 1)
    padded["attention_mask"] = (torch.arange(width) < used).long()[None]
    return padded


def _without_mask(model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hide the mask of packed rows from the model, which would no longer look at ``position_ids``."""
    packed = model.training and "position_ids" in inputs
    return args, {name: value for name, value in inputs.items() if not (packed and name == "attention_mask")}


def _has_token_ids(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return False
    return "input_ids" in (dataset.column_names if isinstance(dataset, datasets.Dataset) else dataset[0])


@dataclass(eq=False)
class Packing(Technique):
    """Train on packed micro-batches of a causal language model.

    Args:
        max_length: Positions of a row, at least 2 and at least the length of the longest example; None: that length.
            Required for a stream.
    """

    max_length: Annotated[int, at.Ge(2)] | None = None
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"max_length": 48}
    layout_: ClassVar[Layout] = CAUSAL
    rank_counters: ClassVar = ("counts",)

    def prepare_model(self, model: Any) -> nn.Module:
        """Try whether the model keeps packed examples apart."""
        flash = "flash" in attention_of(model)
        self.layout_ = check_kept_apart(model, self, num_rows=1 if flash else 2)  # type: ignore[misc]
        self.by_segment_ = can_attend_by_segment(model, num_rows=2, run=self.run_)
        return model

    def inspect_dataset(self, dataset: Any) -> None:
        """Find the longest example."""
        self.width_ = self.max_length or 0
        if self.max_length is not None and not _has_token_ids(dataset):
            return  # reading checks each example
        lengths_N = example_lengths(dataset, "input_ids", asking=self, remedy="Set max_length=.").longest_N
        self._check_fits(longest := int(lengths_N.max()))
        self.width_ = self.max_length or longest

    def _check_fits(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"{self!r} does not support an example of {length} tokens. Set max_length={length} or truncate it."
            )

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.width_ > limit:
            raise ValueError(
                f"{self!r} does not support rows of {self.width_} tokens because the model has {limit} positions. Set "
                f"max_length={limit} or less."
            )
        if self.by_segment_ and not args.torch_compile:
            attend_by_segment(model)
        self.hook_ = model.register_forward_pre_hook(_without_mask, with_kwargs=True)
        self.in_one_row_ = "flash" in attention_of(model)
        self.counts_ = {"rows": 0, "examples": 0, "tokens": 0, "positions": 0}

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        attend_as_before(model)
        self.hook_.remove()

    def collate(self, features: Sequence[Mapping[str, Any]], collator: Callable) -> dict[str, Any]:
        """Pack the examples, each as the collator makes it alone."""
        examples = unpadded([collator([feature]) for feature in features], self, self.layout_)
        lengths = [example["input_ids"].shape[1] for example in examples]
        self._check_fits(max(lengths))
        width = max(self.width_, *lengths)
        placed = best_fit_decreasing(lengths, width)
        rows = [filled_up(end_to_end([examples[i] for i in row]), width) for row in placed]
        packed: dict[str, Any] = {
            name: torch.cat([row[name] for row in rows], int(self.in_one_row_)) for name in rows[0]
        }
        packed[ORDER] = torch.tensor([i for row in placed for i in row])
        return packed

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Count rows, examples and tokens."""
        for micro in batch.micro_batches:
            mask_RL = micro.inputs["attention_mask"]
            self.counts_["rows"] += len(mask_RL)
            self.counts_["examples"] += len(micro.ids_B)
            self.counts_["tokens"] += int(mask_RL.sum())
            self.counts_["positions"] += mask_RL.numel()
        return batch

    def report(self) -> Mapping[str, Any]:
        """Report the examples per row and the share of padding on this rank."""
        counts = self.counts_
        return {
            "examples_per_row": counts["examples"] / max(counts["rows"], 1),
            "padding": 1 - counts["tokens"] / max(counts["positions"], 1),
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["examples_per_row"] > 1
