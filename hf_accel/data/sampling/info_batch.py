"""Skip a random share of the examples with a low loss, and weight the rest so that the gradient stays unbiased.

An epoch over fewer examples costs less.  The last loss of each example is its score.  An epoch trains on

    every example with a score of at least the mean, or without a score       weight 1
    a random share ``keep`` of the n others, k = round(keep * n) of them      weight n / k

so the expected sum of weighted losses equals the sum over the whole data set.  The first epoch is full, because no
example has a score yet.  Every epoch that starts at progress ``end`` or later is full, too.

Recommendation: Use InfoBatch if you train on clean data for about eight epochs or more.
When to use: Image classification and fine-tuning on clean data; the authors report 20 to 40 % fewer samples there.
When not to use:
- One to three epochs: the first one is always full.
- Noisy labels: an example with a high loss is never skipped.
- Without a comparison: a random subset per epoch with a fully decayed learning rate is the rival to beat.  We know of
  no independent comparison in which InfoBatch beats it.
Defaults: The values are those of the authors' CIFAR-100 example (``--ratio 0.5 --delta 0.875``).
Differences from the paper:
- The weight is n / k instead of 1 / keep, so rounding cannot bias the gradient.
- Unseen examples have no score; the authors start all scores at 3.
- ``end`` is a share of the budget, so the learning rate reaches zero although epochs are short.
Reference: Qin et al. (2024), InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning,
https://arxiv.org/abs/2303.04947; code: https://github.com/NUS-HPC-AI-Lab/InfoBatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.technique import Fraction, Technique


def prune_learned(scores_N: Tensor, keep: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the examples of one epoch: their ids, ascending, and their weights.

    A score of NaN marks an example without a score.  ``N`` counts the data set first, and the chosen examples later.
    """
    low_N = (scores_N < scores_N.nanmean()).nonzero().squeeze(1)  # a comparison with NaN is false
    weights_N = torch.ones(len(scores_N))
    if len(low_N):
        num_kept = max(round(keep * len(low_N)), 1)
        kept_N = low_N[torch.randperm(len(low_N), generator=generator)[:num_kept]]
        weights_N[low_N] = 0.0
        weights_N[kept_N] = len(low_N) / num_kept
    ids_N = weights_N.nonzero().squeeze(1)
    return ids_N, weights_N[ids_N]


@dataclass(eq=False)
class InfoBatch(Technique):
    """Train each epoch on all high-loss examples and on a random, up-weighted share of the low-loss ones.

    Args:
        keep: Share of the low-loss examples that an epoch keeps, in (0, 1]; the paper's 1 - r.
        end: Progress, in [0, 1], from which epochs are full; the paper's delta.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
    end: Fraction = 0.875
    fidelity: ClassVar = "unbiased"
    neutral: ClassVar = {"keep": 1.0}
    counters: ClassVar = ("scores", "kept", "offered")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.scores_ = torch.empty(0)
        self.kept_, self.offered_ = 0, 0

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Choose all high-loss examples and a random share of the others."""
        assert self.run_ is not None
        if len(self.scores_) == 0:
            self.scores_ = torch.full((num_examples,), float("nan"))
        ids_N, weights_N = torch.arange(num_examples), None
        if self.keep < 1 and self.run_.clock.progress < self.end:
            ids_N, weights_N = prune_learned(self.scores_, self.keep, generator)
        self.kept_ += len(ids_N)
        self.offered_ += num_examples
        return ids_N, None if weights_N is None or weights_N.eq(1).all() else weights_N

    def observe(self, ids_B: Tensor, losses_B: Tensor) -> None:
        """Store the last loss of each example as its score."""
        self.scores_[ids_B] = losses_B.to(self.scores_.dtype)

    def report(self) -> Mapping[str, Any]:
        """Report the share of examples that epochs chose; an unfinished epoch counts with its full choice."""
        return {"kept": self.kept_ / self.offered_ if self.offered_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
