"""Placebos: what a candidate must beat to have earned its place.

The first placebo, a shorter baseline, is the baseline's curve itself.  The others are arms of their own: the
candidate's learning rate on the baseline, a random subset of the size that the candidate trained on, and a bigger
batch for the memory that it took.
"""

from __future__ import annotations

from hf_accel.data.sampling.random_subset import RandomSubset
from hf_accel.recipe import Recipe


def learning_rate_placebo(candidate: Recipe, baseline: Recipe) -> Recipe | None:
    """The baseline with the candidate's learning rate, where that is another."""
    rate = candidate.args.get("learning_rate")
    if rate is None or rate == baseline.args.get("learning_rate"):
        return None
    return Recipe(args=baseline.args | {"learning_rate": rate})


def random_subset_placebo(candidate: Recipe, baseline: Recipe, sample_ratio: float) -> Recipe | None:
    """The baseline on a random subset, where the candidate chooses examples and trains on fewer than 97 %."""
    chooses = any(
        {"select", "step_select"} & technique.implemented_hooks() for technique in candidate.build_techniques()
    )
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
