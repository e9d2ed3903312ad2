"""Arms: the ways to train that a comparison compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_accel.recipe import Recipe, read_technique, write_technique
from hf_accel.technique import STREAM

TECHNICAL = ("per_device_eval_batch_size", "remove_unused_columns", "label_names", "bf16", "fp16")
"""Arguments that a workload needs in order to run; Trainer's defaults keep them."""

REPLACED = {
    "schedule": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "optimizer": ("optim", "optim_args"),
    "order": ("train_sampling_strategy",),
}
"""Arguments that a technique replaces, by the slot that it owns; any stream has an order of its own."""

DEFAULTS = "Trainer's defaults"
"""Name of the arm with Trainer's untouched arguments."""

AT_EVERY_HORIZON = ("baseline", "defaults")
"""Roles of the arms that give a curve of quality against cost."""


@dataclass
class Arm:
    """One way to train.

    Args:
        name: Name in tables.
        recipe: Arguments and techniques; an arm inherits the other arguments from the baseline.
        role: Purpose in the comparison.
        of: Candidate that this arm is a placebo or an ablation of.
        horizon: Share of the nominal budget, one of the comparison's horizons; `AT_EVERY_HORIZON` run at all of them.
    """

    name: str
    recipe: Recipe
    role: Literal["baseline", "candidate", "placebo", "ablation", "defaults"] = "candidate"
    of: str | None = None
    horizon: float = 1.0

    def changed(self, values: Mapping[str, Any]) -> Arm:
        """Return the arm with other values of some arguments, and of its techniques' fields as ``Technique.field``."""
        args = self.recipe.args | {name: value for name, value in values.items() if "." not in name}
        techniques = [
            {name: fields | _of(name, values) for name, fields in entry.items()} for entry in self.recipe.techniques
        ]
        return dataclasses.replace(self, recipe=Recipe(args=args, techniques=techniques))

    def replaced(self) -> set[str]:
        """Return the arguments that the arm's techniques replace."""
        hooks = {hook for technique in self.recipe.build_techniques() for hook in technique.implemented_hooks()}
        slots = [slot for slot in REPLACED if slot in hooks or (slot == "order" and hooks & STREAM)]
        return {name for slot in slots for name in REPLACED[slot]}

    def inherit(self, args: Mapping[str, Any]) -> Arm:
        """Return the arm with ``args`` where its recipe names none; raise where the recipe is wrong."""
        replaced = self.replaced()
        inherited = {name: value for name, value in args.items() if name not in replaced}
        arm = self.changed(inherited | self.recipe.args)
        arm.recipe.training_arguments()
        return arm


def read_arm(candidate: Arm | Recipe | str | Path, horizon: float) -> Arm:
    """Read an arm, a recipe, the path of one, or a technique as Python writes it."""
    if isinstance(candidate, Arm):
        return candidate
    if isinstance(candidate, Recipe):
        names = [write_technique(*item) for entry in candidate.techniques for item in entry.items()]
        return Arm(" + ".join(names) or "candidate", candidate, horizon=horizon)
    text = str(candidate)
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return Arm(Path(text).stem, Recipe.load(text), horizon=horizon)
    name = text.rpartition(":")[2].removesuffix("()")
    return Arm(name, Recipe(techniques=[read_technique(text)]), horizon=horizon)


def ablations(arms: Sequence[Arm]) -> list[Arm]:
    """Leave out each technique of the arms that have several."""
    found = []
    for arm in arms:
        every = arm.recipe.techniques
        for left_out in every if len(every) > 1 else []:
            recipe = Recipe(args=arm.recipe.args, techniques=[entry for entry in every if entry is not left_out])
            found.append(Arm(f"{arm.name} without {next(iter(left_out))}", recipe, "ablation", arm.name, arm.horizon))
    return found


def trainer_defaults(reference: Arm) -> list[Arm]:
    """Return Trainer's untouched defaults as an arm, unless they are the baseline."""
    args = {name: value for name, value in reference.recipe.args.items() if name in TECHNICAL}
    if args == reference.recipe.args:
        return []
    return [Arm(DEFAULTS, Recipe(args=args), "defaults")]


def _of(technique: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a technique's fields."""
    split = {tuple(name.rpartition(".")[::2]): value for name, value in values.items()}
    return {field: value for (name, field), value in split.items() if name == technique}
