"""Placebos: what a candidate must beat to have earned its place.

The first placebo, a shorter baseline, is the baseline's curve itself.  The others are arms of their own: the
candidate's learning rate on the baseline, a random subset of the size that the candidate trained on, and a bigger
batch for the memory that it took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.recipe import Recipe
from hf_accel.technique import Technique


@dataclass(eq=False)
class RandomSubset(Technique):
    """Trains each epoch on another random share of the examples, with equal weights.

    Reference: Okanovic et al. (2024), Repeated random sampling for minimizing the time-to-accuracy of learning,
    https://arxiv.org/abs/2305.18424: at equal size, above 22 methods of pruning.

    Args:
        keep: Share of the examples, in (0, 1].
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
    fidelity: ClassVar = "unbiased"

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        kept = torch.randperm(num_examples, generator=generator)[: max(round(self.keep * num_examples), 1)]
        return kept.sort().values, None


def learning_rate_placebo(candidate: Recipe, baseline: Recipe) -> Recipe | None:
    """The baseline with the candidate's learning rate, where that is another."""
    rate = candidate.args.get("learning_rate")
    if rate is None or rate == baseline.args.get("learning_rate"):
        return None
    return Recipe(args=baseline.args | {"learning_rate": rate})


def random_subset_placebo(candidate: Recipe, baseline: Recipe, sample_ratio: float) -> Recipe | None:
    """The baseline on a random subset, where the candidate chooses examples and trains on fewer than 97 %."""
    chooses = any({"select", "step_select"} & technique.answers() for technique in candidate.build_techniques())
    if not chooses or not 0 < sample_ratio < 0.97:
        return None
    return Recipe(args=baseline.args, techniques=[RandomSubset(keep=round(sample_ratio, 2))])


def bigger_batch_placebo(baseline: Recipe, memory_ratio: float) -> Recipe | None:
    """The baseline with a batch that is larger by the candidate's extra memory, where that is more than a tenth."""
    size = baseline.args.get("per_device_train_batch_size", 8)
    larger = round(size * memory_ratio)
    if memory_ratio < 1.1 or larger <= size:
        return None
    return Recipe(args=baseline.args | {"per_device_train_batch_size": larger})
