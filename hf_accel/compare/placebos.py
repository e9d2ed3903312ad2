"""Placebos: cheap alternatives that a candidate must beat.

The baseline's shorter horizons are one placebo.  The others are arms: the baseline with the candidate's learning rate,
a random subset of its size, or a batch that fills its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_accel.compare.arms import Arm
from hf_accel.compare.plan import Run
from hf_accel.data.sampling.random_subset import RandomSubset
from hf_accel.recipe import Recipe


def learning_rate_placebos(arms: Sequence[Arm], baseline: Recipe) -> list[Arm]:
    """Give the baseline the learning rate of each arm that has another one."""
    found = []
    for arm in arms:
        rate = arm.recipe.args.get("learning_rate")
        if rate is not None and rate != baseline.args.get("learning_rate"):
            recipe = Recipe(args=baseline.args | {"learning_rate": rate})
            found.append(Arm(f"baseline, LR of {arm.name}", recipe, "placebo", arm.name, arm.horizon))
    return found


def measured_placebos(arms: Sequence[Arm], baseline: Recipe, records: Mapping[Run, Mapping[str, Any]]) -> list[Arm]:
    """Return the placebos whose size depends on what the arms were measured to use."""
    found = []
    for arm in arms:
        own, plain = (
            [r for run, r in records.items() if (run.arm, run.horizon) == (name, arm.horizon) and "costs" in r]
            for name in (arm.name, "baseline")
        )
        samples = _ratio([r["costs"]["samples"] for r in own], [r["costs"]["samples"] for r in plain])
        memory = _ratio([r["peak_memory_bytes"] for r in own], [r["peak_memory_bytes"] for r in plain])
        recipes = {
            "random subset": random_subset_placebo(arm.recipe, baseline, samples),
            "bigger batch": bigger_batch_placebo(baseline, memory),
        }
        for name, recipe in recipes.items():
            if recipe is not None:
                found.append(Arm(f"{name}, as {arm.name}", recipe, "placebo", arm.name, arm.horizon))
    return found


def random_subset_placebo(candidate: Recipe, baseline: Recipe, sample_ratio: float) -> Recipe | None:
    """Train the baseline on a random subset, if the candidate selects examples and trains on fewer than 97 %."""
    selects = any(
        {"select", "step_select"} & technique.implemented_hooks() for technique in candidate.build_techniques()
    )
    if not selects or not 0 < sample_ratio < 0.97:
        return None
    return Recipe(args=baseline.args, techniques=[RandomSubset(keep=round(sample_ratio, 2))])


def bigger_batch_placebo(baseline: Recipe, memory_ratio: float) -> Recipe | None:
    """Enlarge the baseline's batch by the candidate's extra memory, if that is more than a tenth."""
    size = baseline.args.get("per_device_train_batch_size", 8)
    larger = round(size * memory_ratio)
    if memory_ratio < 1.1 or larger <= size:
        return None
    return Recipe(args=baseline.args | {"per_device_train_batch_size": larger})


def _ratio(own: Sequence[float], plain: Sequence[float]) -> float:
    """Divide the means; 0 where nothing was measured."""
    return fmean(own) / fmean(plain) if own and any(plain) else 0.0
