"""Token budget: as many examples a step as have a given number of tokens together.

With a fixed number of examples, a step of short ones tells the optimizer less than a step of long ones, and with a loss
that is a mean over tokens, each of its tokens counts for more.  Here a step takes the next k examples, in their order:

    k = argmin_k | l_1 + ... + l_k - T |,   k >= 1,   T = `tokens`

with the lengths l of the upcoming examples.  So a step is off by at most half of one example's length, but for the last
one of an epoch, which takes what is left.

Reference: batches of about so many tokens are those of Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, section
5.1; fairseq's ``--max-tokens``, https://arxiv.org/abs/1904.01038, is a bound for memory and not a mean for the
optimizer.  Departure: the nearest sum, not the largest below a bound, so that there is no bias.

When to use: fine-tuning and pre-training of language models on examples of very different length; with batches that are
ordered by length, whose steps would differ most.
When not to use: where every example is to count the same, as in classification; examples of equal length.  What fits
into memory is not what this is about: a forward pass still takes ``micro_batch_size`` examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_accel.features.lengths import example_lengths
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def nearest_count(lengths_N: Tensor, tokens: int) -> int:
    """How many examples, from the first one on, have about so many tokens; the fewer of two that are as near."""
    return int((lengths_N.cumsum(0) - tokens).abs().argmin()) + 1


@dataclass(eq=False)
class TokensPerBatch(Technique):
    """Gives each step the number of examples that have nearly a fixed number of tokens together.

    Args:
        tokens: Tokens of a step over all ranks, at least 1, and at least those of the longest example; None: those that
            the nominal batch size has on average.  Needed for a stream.
    """

    tokens: Annotated[int, at.Ge(1)] | None = None
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"tokens": 60}
    counters: ClassVar = ("counts",)

    def inspect_dataset(self, dataset: Any) -> None:
        """Read the lengths, from ``args.length_column_name`` if the data set has that column, else of ``input_ids``."""
        run: Any = self.run_
        self.lengths_N_ = None
        if isinstance(dataset, IterableDataset) and self.tokens is not None:
            self.tokens_, self.most_ = self.tokens, None
            return
        column = run.args.length_column_name
        remedy = f"Tokenize it before training, or add a column {column!r} with the lengths."
        if isinstance(dataset, IterableDataset):
            remedy = "Give tokens=."
        lengths_N = example_lengths(dataset, column, "input_ids", asking=self, remedy=remedy).tokens_N
        if lengths_N.is_floating_point():
            raise ValueError(
                f"{self!r}: the column {column!r} holds lengths that are no whole numbers of tokens. Set "
                "args.length_column_name to a column of token counts."
            )
        self.lengths_N_ = lengths_N
        longest, mean = int(lengths_N.max()), float(lengths_N.double().mean())
        self.tokens_ = self.tokens or max(round(mean * run.nominal_batch_size), longest, 1)
        self.most_ = self.tokens_ // max(int(lengths_N.min()), 1) + 1
        if self.tokens_ < longest:
            raise ValueError(f"{self!r}: the longest example has {longest} tokens. Give at least that, or truncate it.")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.counts_ = {"steps": 0, "tokens": 0, "furthest": 0, "longest": 0}
        self.lengths_of_step_: Tensor | None = None

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """The number of examples whose tokens come nearest to the budget, over all ranks."""
        return nearest_count(self._lengths(upcoming_ids_N[: self.most_]), self.tokens_)

    def _lengths(self, ids_N: Tensor) -> Tensor:
        if self.lengths_N_ is not None:
            return self.lengths_N_[ids_N]
        assert self.run_ is not None
        examples = self.run_.stream.reader.dataset
        upcoming = [examples[i] for i in ids_N.tolist()]
        return example_lengths(upcoming, "input_ids", asking=self, remedy="Tokenize the stream.").tokens_N

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Looks at what was drawn; a step that is read again, whole or in part, is the same step."""
        if self.lengths_of_step_ is None:
            self.lengths_of_step_ = self._lengths(batch.plan.ids_N)
        return batch

    def on_step_end(self, args, state, control, **kwargs):
        assert self.lengths_of_step_ is not None and self.run_ is not None
        tokens, counts = int(self.lengths_of_step_.sum()), self.counts_
        if not self.run_.stream.epoch_is_over:
            counts["steps"] += 1
            counts["tokens"] += tokens
            counts["furthest"] = max(counts["furthest"], abs(tokens - self.tokens_))
        counts["longest"] = max(counts["longest"], int(self.lengths_of_step_.max()))
        self.lengths_of_step_ = None

    def report(self) -> Mapping[str, Any]:
        """Mean tokens of a step, by how many one was off, both without the last step of an epoch; the longest one."""
        counts = self.counts_
        return {
            "tokens_per_step": counts["tokens"] / max(counts["steps"], 1),
            "furthest": counts["furthest"],
            "longest_example": counts["longest"],
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Steps are as near to the budget as whole examples can come."""
        return report["tokens_per_step"] > 0 and report["furthest"] <= report["longest_example"] / 2
