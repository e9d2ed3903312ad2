"""Draw the examples of an epoch with replacement, some more often than others.

An epoch of N examples is N independent draws.  Example i is drawn with probability

    p_i = 1 / (C * n_c)            weights="balanced": each of the C values of the column ``by`` equally often
    p_i = share_c / n_c            weights={value: share}: values in proportion to their shares
    p_i = w_i / sum_j w_j          weights="column": in proportion to the numbers in the column

where n_c is the number of examples with value c.  One technique thus balances classes, mixes sources and follows
weights that were computed before.  To mix sources, add a column with the source of each example before
``datasets.concatenate_datasets``.  The draws are a plan over all ranks, the same for any number of them.  Random
transforms draw new numbers for each repeat of an example.

Recommendation: Use WeightedSampling if rare classes matter as much as frequent ones, or if you mix sources in known
shares.
When to use: Rare classes that matter as much as frequent ones; mixtures with known shares; sources that should repeat
more often than others.
When not to use: Classes with a handful of examples, which are then repeated until the model memorizes them.  A test
distribution equal to the training one, because the trained model expects the drawn shares.
Differences from the paper: None.
References: He and Garcia (2009), Learning from Imbalanced Data, https://doi.org/10.1109/TKDE.2008.239 (random
oversampling); ``torch.utils.data.WeightedRandomSampler`` draws the same way on one process.
Example: ``WeightedSampling(by="label")``
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_accel.features.columns import column
from hf_accel.technique import Technique


def draw_with_replacement(weights_N: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draw ids, ascending, independently in proportion to the weights of any number of examples."""
    bounds_N = weights_N.double().cumsum(0)
    points = torch.rand(num_draws, generator=generator, dtype=torch.float64) * bounds_N[-1]
    last = int(weights_N.nonzero()[-1])  # rounding may carry a point to the very end
    return torch.searchsorted(bounds_N, points, right=True).clamp(max=last).sort().values


@dataclass(eq=False)
class WeightedSampling(Technique):
    """Draw each epoch with replacement: balanced over a column's values, by their shares, or by weights.

    Args:
        by: Column of the training set with each example's class, source or weight.
        weights: ``"balanced"``: all values of the column equally often; a mapping from each value to its share of the
            draws (shares need not add up to 1); ``"column"``: the column holds each example's weight.
    """

    by: str = "label"  # not taken from a paper
    weights: Literal["balanced", "column"] | Mapping[Any, float] = "balanced"  # random oversampling, from He and Garcia
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"by": "score", "weights": {0: 0.8, 1: 0.1, 2: 0.1}}
    counters: ClassVar = ("drawn", "distinct")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weights, Mapping):
            self._check(self.weights)
        elif self.weights not in ("balanced", "column"):
            raise ValueError(
                f"WeightedSampling(weights={self.weights!r}): weights must be 'balanced', 'column' or a mapping from "
                "each value of the column to its share."
            )

    def inspect_dataset(self, dataset: Any) -> None:
        """Read the column, and compute the weight of each example."""
        values = column(dataset, self.by, self)
        if self.weights == "column":
            weights = values
            self._check(dict(enumerate(values)))
        else:
            try:
                counts = Counter(values)
            except TypeError:
                raise ValueError(
                    f"{self!r} does not support {type(values[0]).__name__}s in the column {self.by!r}. Set by= to a "
                    "column of single values."
                ) from None
            if None in counts:
                raise ValueError(
                    f"{self!r} does not support None in the column {self.by!r}. Fill it in or remove such examples."
                )
            shares = self.weights if isinstance(self.weights, Mapping) else dict.fromkeys(counts, 1.0)
            for value in counts.keys() - shares.keys():
                raise ValueError(
                    f"{self!r}: weights has no share of {value!r}, a value of the column. Add its share, or 0."
                )
            for value in shares.keys() - counts.keys():
                raise ValueError(f"{self!r}: no example has {self.by!r} = {value!r}. Remove {value!r} from weights.")
            weights = [shares[value] / counts[value] for value in values]
        self.weights_N_ = torch.tensor(weights, dtype=torch.float64)
        self.drawn_, self.distinct_ = 0, 0

    def _check(self, weights: Mapping[Any, Any]) -> None:
        for key, weight in weights.items():
            if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
                raise ValueError(
                    f"{self!r} does not support the weight {weight!r} of {key!r}. Use numbers that are not negative."
                )
        if not sum(weights.values()):
            raise ValueError(f"{self!r}: the weights sum to zero. Make one positive.")

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw as many examples as the data set has."""
        ids_N = draw_with_replacement(self.weights_N_, num_examples, generator)
        self.drawn_, self.distinct_ = self.drawn_ + num_examples, self.distinct_ + len(ids_N.unique())
        return ids_N, None

    def report(self) -> Mapping[str, Any]:
        """Report the share of distinct examples among an epoch's draws, averaged over epochs."""
        return {"distinct": self.distinct_ / max(self.drawn_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return 0 < report["distinct"] < 1
