"""Recipes: whole runs as YAML files, and techniques by name."""

from hf_accel.recipe.lookup import (
    RecipeError,
    build_technique,
    find_technique,
    known_techniques,
    read_technique,
    write_technique,
)
from hf_accel.recipe.recipe import Recipe, check_fields

__all__ = [
    "Recipe",
    "RecipeError",
    "build_technique",
    "check_fields",
    "find_technique",
    "known_techniques",
    "read_technique",
    "write_technique",
]
