"""Find techniques by name, and build them from plain data."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from hf_accel.recipe.technique_syntax import nearest, read_call
from hf_accel.technique import Technique


class RecipeError(ValueError):
    """An invalid recipe, or an invalid option that replaces a part of it."""


def known_techniques() -> dict[str, type[Technique]]:
    """Return the techniques that `hf_accel` exports, by name."""
    package = importlib.import_module("hf_accel")
    exported = {name: getattr(package, name) for name in package.__all__}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, Technique) and value is not Technique
    }


def find_technique(name: str) -> type[Technique]:
    """Return the technique with a name in `hf_accel`, or with the name ``package.module:Class``."""
    known = known_techniques()
    if "(" in name:
        raise RecipeError(f"technique({name!r}): is a call. In a recipe, write '- Name: {{field: value}}'.")
    if name in known:
        return known[name]
    module, colon, member = name.partition(":")
    if not colon:
        raise RecipeError(
            f"technique({name!r}): there is no such technique. {nearest(name, known)} "
            "The name of your own is 'module:Class'."
        )
    try:
        found = getattr(importlib.import_module(module), member)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"technique({name!r}): cannot be imported ({error}). Check the name and PYTHONPATH."
        ) from None
    if not (isinstance(found, type) and issubclass(found, Technique)):
        raise RecipeError(f"technique({name!r}): is not a Technique. Name a subclass of hf_accel.Technique.")
    return found


def build_technique(name: str, fields: Mapping[str, Any], positional: Sequence[Any] = ()) -> Technique:
    """Build the technique with a name and the values of its fields."""
    kind = find_technique(name)
    known = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in fields:
        if key not in known:
            raise RecipeError(f"{name}: there is no field {key!r}. {nearest(str(key), known)}")
    if len(positional) > len(known):
        raise RecipeError(f"{name}: takes at most {len(known)} values, not {len(positional)}. Give fewer.")
    given = dict(zip(known, positional, strict=False))
    if twice := given.keys() & fields.keys():
        raise RecipeError(f"{name}: {min(twice)!r} is given twice. Give it once.")
    return kind(**given, **fields)


def write_technique(name: str, fields: Mapping[str, Any]) -> str:
    """Write a technique in Python syntax, without its module and without fields at their defaults."""
    default = build_technique(name, {})
    changed = [f"{key}={value!r}" for key, value in fields.items() if getattr(default, key) != value]
    return name.rpartition(":")[2] + (f"({', '.join(changed)})" if changed else "")


def read_technique(text: str) -> Technique:
    """Build a technique from Python syntax: ``InfoBatch(keep=0.5)``."""
    try:
        name, positional, fields = read_call(text)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return build_technique(name, fields, positional)
