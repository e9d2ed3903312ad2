"""Check values of fields against the bounds that their annotations declare."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args

import annotated_types as at


def field_hints(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass and its bases; `get_type_hints` refuses a plain ClassVar on Python 3.10."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        hints |= inspect.get_annotations(base, eval_str=True)
    return hints


def check_decorated(kind: type) -> None:
    """Raise TypeError if a class declares a field but is no dataclass, which would ignore the field."""
    for base in kind.__mro__:
        hints = inspect.get_annotations(base).items()
        fields = [name for name, hint in hints if name in vars(base) and "ClassVar" not in str(hint)]
        if fields and "__dataclass_fields__" not in vars(base):
            raise TypeError(
                f"{base.__name__}: {fields[0]!r} is not a hyperparameter, because the class is no dataclass. "
                "Write @dataclass(eq=False) above the class."
            )


def check_bounds(technique: Any) -> None:
    """Raise ValueError if a field breaks the bound or the choice that its annotation declares."""
    hints = field_hints(type(technique))
    for field in dataclasses.fields(technique):
        value, hint = getattr(technique, field.name), hints[field.name]
        name = f"{type(technique).__name__}({field.name}={value!r})"
        if (rule := broken_rule(value, hint)) is not None:
            raise ValueError(f"{name}: {field.name} must be {rule}.")


def broken_rule(value: Any, hint: Any) -> str | None:
    """Describe the rule of an annotation that a value breaks; return None if it breaks none."""
    if getattr(hint, "__metadata__", None) is None:
        options = get_args(hint)
        if options and all(isinstance(option, str) for option in options):  # Literal
            return None if value in options else "one of " + ", ".join(map(repr, options))
        if type(None) in options:  # optional
            rules = [broken_rule(value, option) for option in options if option is not type(None)]
            return None if value is None or None in rules else f"{rules[0]}, or None"
        if hint in (int, float, bool, str) and not _is_a(value, hint):
            return f"{_with_article(hint)}, not {_with_article(type(value))}"
        return None
    base, *metadata = get_args(hint)
    if (rule := broken_rule(value, base)) is not None:
        return rule
    bounds = [bound for item in metadata for bound in (item if isinstance(item, at.GroupedMetadata) else (item,))]
    tests = {at.Gt: (">", "gt"), at.Ge: (">=", "ge"), at.Lt: ("<", "lt"), at.Le: ("<=", "le")}
    words, broken = [], False
    for bound in bounds:
        if type(bound) in tests:
            sign, attribute = tests[type(bound)]
            limit = getattr(bound, attribute)
            words.append(f"{sign} {limit}")
            holds = {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[sign]
            broken |= not holds
    return " and ".join(words) if broken else None


def _with_article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
