"""InfoBatch: skip a random part of the examples that are already learned, and let the rest of them count more.

An epoch over fewer examples costs less.  With the last loss of each example as its score, an epoch trains on

    every example whose score is at least the mean score, or that has none yet,  with weight 1
    a random share ``keep`` of the n others, k = round(keep * n) of them,        with weight n / k

so that the expected sum of weighted losses is that of the whole set.  The first epoch is full, because no example has a
score, and so is every epoch that begins at progress ``end`` or later.

Reference: Qin et al. (2024), InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning,
https://arxiv.org/abs/2303.04947.  Departures: the weight is n / k and not 1 / keep, so rounding cannot bias it; unseen
examples have no score, where the authors start all scores at 3; the end is a share of the budget, so that the learning
rate ends at zero although epochs are short.

When to use: runs of about eight epochs or more on clean data; the authors report 20 to 40 % fewer samples in image
classification and fine-tuning.
When not to use: one to three epochs (the first is always full); noisy labels (a high loss is never skipped).  A random
subset per epoch with a fully decayed learning rate is the rival that it has to beat; we know of no independent
comparison in which it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.technique import Fraction, State, Technique


def prune_learned(scores_N: Tensor, keep: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids (ascending) and weights of one epoch's examples; a score of NaN means that there is none yet.

    ``N`` are the examples of the data set before the choice, and those kept after it.
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
    """Trains each epoch on all examples of high loss and on a random, up-weighted share of those of low loss.

    Args:
        keep: Share of the low-loss examples that an epoch keeps, in (0, 1]; 1 - r in the paper.
        end: Progress, in [0, 1], from which epochs are full; delta in the paper.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
    end: Fraction = 0.875
    fidelity: ClassVar = "unbiased"
    neutral: ClassVar = {"keep": 1.0}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.scores_ = torch.empty(0)
        self.kept_, self.offered_ = 0, 0

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """All examples of high loss, a random share of the others."""
        assert self.host_ is not None
        if len(self.scores_) == 0:
            self.scores_ = torch.full((num_examples,), float("nan"))
        ids_N, weights_N = torch.arange(num_examples), None
        if self.keep < 1 and self.host_.clock.progress < self.end:
            ids_N, weights_N = prune_learned(self.scores_, self.keep, generator)
        self.kept_ += len(ids_N)
        self.offered_ += num_examples
        return ids_N, None if weights_N is None or weights_N.eq(1).all() else weights_N

    def observe(self, ids_B: Tensor, losses_B: Tensor) -> None:
        """The last loss of an example is its score."""
        self.scores_[ids_B] = losses_B.to(self.scores_.dtype)

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        """The scores, and the counts for the report."""
        return {"scores": self.scores_, "kept": self.kept_, "offered": self.offered_} if scope == "global" else {}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if scope == "global":
            self.scores_, self.kept_, self.offered_ = state["scores"].clone(), state["kept"], state["offered"]

    def report(self) -> Mapping[str, Any]:
        """The share of the examples that the epochs chose; of an unfinished epoch, of its whole choice."""
        return {"kept": self.kept_ / self.offered_ if self.offered_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
