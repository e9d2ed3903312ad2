"""What a task gives to a Trainer, and the tasks by name."""

from __future__ import annotations

from typing import Any

from hf_accel.recipe import Recipe, RecipeError
from hf_accel.recipe.technique_syntax import nearest
from hf_accel.tasks.causal_lm import causal_lm
from hf_accel.tasks.image_classification import image_classification
from hf_accel.tasks.masked_lm import masked_lm
from hf_accel.tasks.sequence_classification import sequence_classification

Task = dict[str, Any]
"""Keyword arguments of a Trainer: model, data sets, collator, processing class, metrics."""

TASKS = {
    "causal-lm": causal_lm,
    "masked-lm": masked_lm,
    "sequence-classification": sequence_classification,
    "image-classification": image_classification,
}
"""``(model, data) -> Task`` by the name that a recipe gives."""


def build_task(recipe: Recipe) -> Task:
    """Model and data of a recipe.  The model is initialized from torch's global generator: seed it before."""
    if recipe.task is None:
        raise RecipeError(f"recipe: it names no task. Write 'task:' with one of {', '.join(TASKS)}.")
    if recipe.task not in TASKS:
        raise RecipeError(f"task({recipe.task!r}): there is none of this name. {nearest(str(recipe.task), TASKS)}")
    if recipe.model is None:
        raise RecipeError("recipe: it names no model. Write 'model: path' or 'model: {config: {model_type: ...}}'.")
    return TASKS[recipe.task](recipe.model, recipe.data)
