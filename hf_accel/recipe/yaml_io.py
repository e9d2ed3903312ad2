"""Read and write recipes and options as YAML with the values of version 1.2.

PyYAML reads version 1.1, where ``1e-3`` is a string, ``no`` is false, ``1:30`` is 90 and the second of two equal keys
wins.  None of this may happen to a learning rate, an ``eval_strategy`` or a duration.
"""

from __future__ import annotations

import re
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
            raise ValueError(f"line {node.start_mark.line + 1}: {twice[0]!r} appears twice. Keep one.")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quote texts that either version would read as something else, and write unknown objects as their repr."""


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(repr(value)))


for _kind, (_pattern, _first) in _VALUES.items():
    for _notation in (_Loader, _Dumper):
        _notation.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if "0x" in node.value else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text; raise ValueError, in one sentence, if it is invalid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}. Correct the YAML there.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(str(error).split())}. Correct the YAML there.") from None


def dump_yaml(value: Any) -> str:
    """Return a YAML text that `load_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
