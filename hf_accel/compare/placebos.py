"""Placebos: cheap alternatives that a candidate must beat, each with the baseline's method.

Every candidate has at least one, the baseline with another order of the examples.  Others have the candidate's learning
rate, batch size or warm-up, where it changes them, and one has all arguments that it changes.  Two more are sized by
the measured use of a candidate: a random subset of its size, and a batch that fills its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_accel.compare.arms import Arm
from hf_accel.compare.plan import Run
from hf_accel.data.sampling.random_subset import RandomSubset
from hf_accel.evidence.cards import trained_with
from hf_accel.recipe import Recipe

LABELS = {"learning_rate": "LR", "per_device_train_batch_size": "batch", "warmup_steps": "warm-up"}
OTHER_ORDER = 5000
"""A data seed; the worker adds the seed of the run, and gives dropout the same one."""


def planned_placebos(arms: Sequence[Arm], baseline: Recipe) -> list[Arm]:
    """Return the placebos that can be planned before anything is measured: at least one for each arm."""
    return [
        Arm(f"baseline, {label} of {arm.name}", recipe, "placebo", arm.name, arm.horizon)
        for arm in arms
        for label, recipe in planned_recipes(arm.recipe, baseline).items()
    ]


def planned_recipes(candidate: Recipe, baseline: Recipe) -> dict[str, Recipe]:
    """Return the placebos of a candidate by their labels."""
    changed = trained_with(candidate.args) if candidate.techniques else {}  # without any, they are the candidate
    for technique in candidate.build_techniques():
        if "schedule" in technique.implemented_hooks() and "warmup" in vars(technique):
            changed["warmup_steps"] = vars(technique)["warmup"]
    changed = {name: value for name, value in changed.items() if value != baseline.args.get(name)}
    given = {"another order": {"data_seed": OTHER_ORDER}}
    given |= {label: {name: changed[name]} for name, label in LABELS.items() if name in changed}
    if changed and changed not in given.values():
        given["arguments"] = changed
    return {label: Recipe(args=baseline.args | args) for label, args in given.items()}


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
    # The subset's stream orders the examples itself.
    args = {name: value for name, value in baseline.args.items() if name != "train_sampling_strategy"}
    return Recipe(args=args, techniques=[RandomSubset(keep=round(sample_ratio, 2))])


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
