"""Score the examples in the first epochs, and continue with those that still teach something.

Epochs are full until progress ``after``.  The score of an example comes from its losses in these epochs:

    el2n        mean of  sqrt(2) * (1 - exp(-loss))      close to || p - onehot ||, and equal to it for two classes
    loss        mean of the loss
    forgetting  how often the loss rose above log 2 after it was below; more than any number where it never was below

The first epoch that begins at ``after`` or later, and all epochs after it, train on the share ``keep`` with the highest
scores.  With ``balance``, they train on that share of each class.  The scores are free, because training computes the
losses anyway.

Recommendation: Use EarlyScorePruning if you train for ten epochs or more on clean, redundant data.
When to use: Runs of ten epochs or more on clean, redundant data.
When not to use: Few epochs; noisy labels, because these are kept; small classes without ``balance``.  A random subset
per epoch is reported to be better at equal time (https://arxiv.org/abs/2305.18424).
Differences from the paper:
- Scores are computed from losses, so they exist for any model.
- An example counts as learned when the model gives its target a probability above 1/2; the authors ask for the highest
  probability.
- The run continues, while the authors restart on the kept examples.
References: Paul et al. (2021), Deep Learning on a Data Diet, https://arxiv.org/abs/2107.07075 (EL2N after a few
epochs); Toneva et al. (2019), An Empirical Study of Example Forgetting during Deep Neural Network Learning,
https://arxiv.org/abs/1812.05159.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.features.columns import check_indexable, column
from hf_accel.features.scores import keep_by_score
from hf_accel.technique import Fraction, Technique


@dataclass(eq=False)
class EarlyScorePruning(Technique):
    """Train, after the first epochs, on the share of the examples with the highest scores.

    Args:
        score: ``"el2n"``, ``"loss"`` or ``"forgetting"``.
        keep: Share of the examples that later epochs train on, in (0, 1].
        after: Progress, in [0, 1], from which epochs are short; the first epoch is always full.
        balance: Column with classes, to keep the same share of each; None: classes do not matter.
    """

    score: Literal["el2n", "loss", "forgetting"] = "el2n"  # from Paul et al.
    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.7  # not taken from a paper
    after: Fraction = 0.2  # not taken from a paper
    balance: str | None = None
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"keep": 1.0}
    variations: ClassVar = {"score": "forgetting", "after": 0.5, "balance": "label"}
    counters: ClassVar = ("sums_N", "counts_N", "learned_N", "forgotten_N", "ids_N")

    def inspect_dataset(self, dataset: Any) -> None:
        """Read the classes."""
        check_indexable(dataset, self)
        self.classes_ = None if self.balance is None else column(dataset, self.balance, self)
        for name, number in Counter(self.classes_ or ()).items():
            if round(self.keep * number) == 0:
                raise ValueError(
                    f"{self!r} would keep none of the {number} examples of class {name!r}. Set a larger keep."
                )

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.sums_N_, self.counts_N_ = torch.empty(0, dtype=torch.float64), torch.empty(0)
        self.learned_N_, self.forgotten_N_ = torch.empty(0, dtype=torch.bool), torch.empty(0)
        self.ids_N_ = torch.empty(0, dtype=torch.int64)

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Choose all examples until the scores are final, and then always the same share."""
        assert self.run_ is not None
        if len(self.sums_N_) == 0:
            self.sums_N_, self.counts_N_ = torch.zeros(num_examples).double(), torch.zeros(num_examples)
            self.learned_N_, self.forgotten_N_ = torch.zeros(num_examples).bool(), torch.zeros(num_examples)
        scored = self.counts_N_.sum() > 0
        if self.keep < 1 and scored and not len(self.ids_N_) and self.run_.clock.progress >= self.after:
            self.ids_N_ = keep_by_score(self.scores(), self.keep, "hard", generator, self.classes_, self)
        return self.ids_N_ if len(self.ids_N_) else torch.arange(num_examples), None

    def observe(self, ids_B: Tensor, losses_B: Tensor) -> None:
        """Update the scores until they are final."""
        if len(self.ids_N_):
            return
        losses_B = losses_B.double()
        values_B = losses_B if self.score == "loss" else math.sqrt(2) * -torch.expm1(-losses_B)
        learned_B = losses_B < math.log(2)
        self.sums_N_[ids_B] += values_B
        self.counts_N_[ids_B] += 1
        self.forgotten_N_[ids_B] += (self.learned_N_[ids_B] & ~learned_B).float()
        self.learned_N_[ids_B] = learned_B

    def scores(self) -> Tensor:
        """Return the scores of all examples, (N,)."""
        if self.score == "forgetting":
            return self.forgotten_N_.double().masked_fill(~self.learned_N_ & (self.forgotten_N_ == 0), math.inf)
        return (self.sums_N_ / self.counts_N_).nan_to_num(nan=math.inf)

    def report(self) -> Mapping[str, Any]:
        """Report the share of the examples that later epochs trained on; 1 if none began after ``after``."""
        return {"kept": len(self.ids_N_) / len(self.sums_N_) if len(self.ids_N_) else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
