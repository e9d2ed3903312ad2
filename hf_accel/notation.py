"""How recipes and options are written: YAML with the values of version 1.2, and techniques as Python writes them.

PyYAML reads version 1.1, where ``1e-3`` is a string, ``no`` is false, ``1:30`` is 90 and the second of two equal keys
wins.  None of this may happen to a learning rate, an ``eval_strategy`` or a duration.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any

import yaml

_VALUES = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if twice := [key for position, key in enumerate(keys) if key in keys[:position]]:
            raise ValueError(f"line {node.start_mark.line + 1}: {twice[0]!r} is there twice. Keep one.")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would read as something else than text; writes what YAML cannot say as its repr."""


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(repr(value)))


for _kind, (_pattern, _first) in _VALUES.items():
    for _notation in (_Loader, _Dumper):
        _notation.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if "0x" in node.value else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)


def load_yaml(text: str) -> Any:
    """The value that a YAML text means; ValueError, in one sentence, where it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}. Correct the YAML there.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(str(error).split())}. Correct the YAML there.") from None


def dump_yaml(value: Any) -> str:
    """A YAML text that `load_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional and named arguments of a technique as Python writes it: ``InfoBatch(keep=0.5)``.

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
    """The remedy for an unknown name: ``Did you mean 'x'? Known: ...``, without the list where it is long."""
    known = sorted(known)
    lower = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    if len(known) > 40:
        return f"Did you mean {lower[close[0]]!r}?" if close else f"None of the {len(known)} there is like it."
    question = f"Did you mean {lower[close[0]]!r}? " if close else ""
    return f"{question}Known: {', '.join(known) or 'none'}."
