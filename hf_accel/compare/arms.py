"""Arms: the ways to train that a comparison compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_accel.recipe import Recipe, read_technique

TECHNICAL = ("per_device_eval_batch_size", "remove_unused_columns", "label_names", "bf16", "fp16")
"""Arguments that a workload needs in order to run; Trainer's defaults keep them."""

REPLACED = {
    "schedule": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "optimizer": ("optim", "optim_args"),
}
"""Arguments that a technique replaces, by the slot that it owns."""


@dataclass
class Arm:
    """One way to train.

    Args:
        name: Name in tables.
        recipe: Arguments and techniques; an arm inherits the other arguments from the baseline.
        role: Purpose in the comparison.
        of: Candidate that this arm is a placebo or an ablation of.
        horizon: Share of the nominal budget, one of the comparison's horizons; the baseline runs at all of them.
    """

    name: str
    recipe: Recipe
    role: Literal["baseline", "candidate", "placebo", "ablation", "defaults"] = "candidate"
    of: str | None = None
    horizon: float = 1.0

    def changed(self, args: Mapping[str, Any]) -> Arm:
        """Return the arm with other values of some arguments."""
        recipe = Recipe(args=self.recipe.args | dict(args), techniques=self.recipe.techniques)
        return dataclasses.replace(self, recipe=recipe)

    def inherit(self, args: Mapping[str, Any]) -> Arm:
        """Return the arm with ``args`` where its recipe names none; raise where the recipe is wrong."""
        techniques = self.recipe.build_techniques()
        slots = {slot for slot in REPLACED for technique in techniques if slot in technique.implemented_hooks()}
        replaced = {name for slot in slots for name in REPLACED[slot]}
        inherited = {name: value for name, value in args.items() if name not in replaced}
        arm = self.changed(inherited | self.recipe.args)
        arm.recipe.training_arguments()
        return arm


def read_arm(candidate: Arm | Recipe | str | Path, horizon: float) -> Arm:
    """Read an arm, a recipe, the path of one, or a technique as Python writes it."""
    if isinstance(candidate, Arm):
        return candidate
    if isinstance(candidate, Recipe):
        names = [name.rpartition(":")[2] for entry in candidate.techniques for name in entry]
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


def trainer_defaults(reference: Arm, horizon: float) -> list[Arm]:
    """Return Trainer's untouched defaults as an arm, unless they are the baseline."""
    args = {name: value for name, value in reference.recipe.args.items() if name in TECHNICAL}
    if args == reference.recipe.args:
        return []
    return [Arm("Trainer's defaults", Recipe(args=args), "defaults", horizon=horizon)]
