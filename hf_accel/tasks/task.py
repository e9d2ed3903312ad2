"""Build the arguments of a Trainer from a recipe, by the name of its task."""

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
"""Functions ``(model, data) -> Task`` by the task's name in a recipe."""


def build_task(recipe: Recipe) -> Task:
    """Build the model and the data of a recipe.  Seed torch's global generator before, for the first weights."""
    if recipe.task is None:
        raise RecipeError(f"recipe: it names no task. Write 'task:' with one of {', '.join(TASKS)}.")
    if recipe.task not in TASKS:
        raise RecipeError(f"task({recipe.task!r}): there is no such task. {nearest(str(recipe.task), TASKS)}")
    if recipe.model is None:
        raise RecipeError("recipe: it names no model. Write 'model: path' or 'model: {config: {model_type: ...}}'.")
    return TASKS[recipe.task](recipe.model, recipe.data)
