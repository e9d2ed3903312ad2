"""The workload of a recipe: the user's own model and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    def nominal_budget(self) -> str:
        return self.horizon

    def build(self) -> dict[str, Any]:
        return build_task(Recipe(task=self.task, model=self.model, data=self.data))
