"""Read techniques in Python syntax, and suggest a known name for an unknown one."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any


def read_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the name, positional and named arguments of a technique in Python syntax: ``InfoBatch(keep=0.5)``.

    Values are literals; nothing is evaluated.  The name may be ``package.module:Class``.
    """
    name, parenthesis, _ = text.strip().partition("(")
    try:
        if not re.fullmatch(r"[\w.]+(:\w+)?", name):
            raise ValueError
        call = ast.parse("_" + text.strip()[len(name) :] if parenthesis else "_()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return (
            name,
            [ast.literal_eval(value) for value in call.args],
            {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords},
        )
    except (ValueError, SyntaxError):
        raise ValueError(
            f"technique({text!r}): not a name with literal values. Write, for example, 'InfoBatch(keep=0.5)'."
        ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the advice for an unknown name, ``Did you mean 'x'? Known: ...``, without a long list."""
    known = sorted(known)
    lower = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    if len(known) > 40:
        return f"Did you mean {lower[close[0]]!r}?" if close else f"None of the {len(known)} known names is similar."
    question = f"Did you mean {lower[close[0]]!r}? " if close else ""
    return f"{question}Known: {', '.join(known) or 'none'}."
