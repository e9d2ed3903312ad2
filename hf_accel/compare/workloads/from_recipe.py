"""The workload of a recipe: the user's own model and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_accel.clock import parse_budget
from hf_accel.compare.workloads.workload import Workload
from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task


@dataclass
class FromRecipe(Workload):
    """Task, model and data of a recipe; its budget is the nominal horizon."""

    name = "recipe"

    task: str | None = None
    model: Any = None
    data: dict[str, Any] = field(default_factory=dict)
    horizon: str = "3epochs"

    @classmethod
    def of(cls, recipe: Recipe) -> FromRecipe:
        """Return the workload of a recipe, with the recipe's arguments as those of the baseline."""
        if recipe.task is None or recipe.model is None:
            raise ValueError("workload: none is named, and the recipe has no task and model. Add --workload NAME.")
        budgets = [recipe.budget] if isinstance(recipe.budget, str) else recipe.budget or []
        if len(budgets) != 1 or parse_budget(budgets[0])[0] == "seconds":
            raise ValueError(
                f"budget({recipe.budget!r}): a comparison needs exactly one, not in seconds. Set budget: '3epochs'."
            )
        workload = cls(task=recipe.task, model=recipe.model, data=recipe.data, horizon=budgets[0])
        workload.args = dict(recipe.args)  # type: ignore[misc]
        return workload

    def nominal_budget(self) -> str:
        return self.horizon

    def build(self) -> dict[str, Any]:
        return build_task(Recipe(task=self.task, model=self.model, data=self.data))
