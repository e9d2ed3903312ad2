"""Give each step as many examples as together have a given number of tokens.

With a fixed number of examples, a step of short ones tells the optimizer less than a step of long ones.  If the loss is
a mean over tokens, each token of a short step also counts for more.  Here a step takes the next k examples in order:

    k = argmin_k | l_1 + ... + l_k - T |,   k >= 1,   T = `tokens`

with the lengths l of the upcoming examples.  A step is therefore off by at most half of one example's length.  The last
step of an epoch takes the rest.

Recommendation: Use TokensPerBatch if you train a language model on examples of very different length.
When to use: Fine-tuning and pre-training of language models on examples of very different length.  Batches ordered by
length need it most, because their steps would differ most.
When not to use: Classification, where every example should count the same, and examples of equal length.  It does not
limit memory: a forward pass still takes ``micro_batch_size`` examples.
Differences from the paper: A step takes the nearest sum, not the largest below a bound, so there is no bias.
References: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, section 5.1, for batches of about so many tokens;
fairseq's ``--max-tokens``, https://arxiv.org/abs/1904.01038, which bounds memory instead of setting a mean.
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
    """Return how many of the first examples come nearest to ``tokens``; of two equally near numbers, the smaller."""
    return int((lengths_N.cumsum(0) - tokens).abs().argmin()) + 1


@dataclass(eq=False)
class TokensPerBatch(Technique):
    """Give each step the number of examples that together come nearest to a fixed number of tokens.

    Args:
        tokens: Tokens of a step over all ranks, at least 1 and at least the length of the longest example; None: the
            mean of the nominal batch size.  Required for a stream.
    """

    tokens: Annotated[int, at.Ge(1)] | None = None
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"tokens": 60}
    counters: ClassVar = ("counts",)

    def inspect_dataset(self, dataset: Any) -> None:
        """Read the lengths from the column ``args.length_column_name``, or from ``input_ids`` if it is absent."""
        run: Any = self.run_
        self.lengths_N_ = None
        if isinstance(dataset, IterableDataset) and self.tokens is not None:
            self.tokens_, self.most_ = self.tokens, None
            return
        column = run.args.length_column_name
        remedy = f"Tokenize it before training, or add a column {column!r} with the lengths."
        if isinstance(dataset, IterableDataset):
            remedy = "Set tokens=."
        lengths_N = example_lengths(dataset, column, "input_ids", asking=self, remedy=remedy).tokens_N
        if lengths_N.is_floating_point():
            raise ValueError(
                f"{self!r} does not support lengths that are not whole numbers of tokens, as in the column {column!r}. "
                "Set args.length_column_name to a column of token counts."
            )
        self.lengths_N_ = lengths_N
        longest, mean = int(lengths_N.max()), float(lengths_N.double().mean())
        self.tokens_ = self.tokens or max(round(mean * run.nominal_batch_size), longest, 1)
        self.most_ = self.tokens_ // max(int(lengths_N.min()), 1) + 1
        if self.tokens_ < longest:
            raise ValueError(
                f"{self!r} does not support an example of {longest} tokens. Set tokens={longest} or truncate it."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.counts_ = {"steps": 0, "tokens": 0, "furthest": 0, "longest": 0}
        self.lengths_of_step_: Tensor | None = None

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """Return the number of examples that come nearest to the tokens of a step, over all ranks."""
        return nearest_count(self._lengths(upcoming_ids_N[: self.most_]), self.tokens_)

    def _lengths(self, ids_N: Tensor) -> Tensor:
        if self.lengths_N_ is not None:
            return self.lengths_N_[ids_N]
        assert self.run_ is not None
        examples = self.run_.stream.reader.dataset
        upcoming = [examples[i] for i in ids_N.tolist()]
        return example_lengths(upcoming, "input_ids", asking=self, remedy="Tokenize the stream.").tokens_N

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Measure the drawn examples once; a step that is read again counts as the same step."""
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
        """Report the mean tokens of a step, the largest deviation, and the longest example.

        The last step of an epoch counts for neither of the first two.
        """
        counts = self.counts_
        return {
            "tokens_per_step": counts["tokens"] / max(counts["steps"], 1),
            "furthest": counts["furthest"],
            "longest_example": counts["longest"],
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Return whether steps come as near to the number as whole examples can."""
        return report["tokens_per_step"] > 0 and report["furthest"] <= report["longest_example"] / 2
