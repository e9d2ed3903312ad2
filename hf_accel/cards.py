"""The card of each technique, from its code and from the records of comparisons."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import annotated_types as at

import hf_accel
from hf_accel import evidence
from hf_accel.evidence import Arm, Record, Records
from hf_accel.recipe import known_techniques
from hf_accel.technique import HOOKS, SLOTS, Technique

ROOT = Path(hf_accel.__file__).parents[1]
AREAS = {"data": "data", "model": "model", "optim": "optimization", "budget": "budgeted", "system": "system"}
"""Names of the five perspectives, by package."""
FIDELITY = {
    "exact": "the same result",
    "unbiased": "the same gradient in expectation",
    "lossy": "another result",
}
PARTS = ("Reference", "When to use", "When not to use")
NOTE = "<!-- Written by docs/generate.py from the code. -->"


def in_order() -> list[tuple[str, type[Technique]]]:
    """The techniques of `hf_accel`, by perspective, then by name."""
    return sorted(known_techniques().items(), key=lambda item: (area(item[1]), item[0]))


def source(kind: type[Technique]) -> Path:
    """The file of a technique."""
    return Path(inspect.getfile(kind))


def area(kind: type[Technique]) -> str:
    """The perspective of a technique."""
    return AREAS[kind.__module__.split(".")[1]]


def owned(kind: type[Technique]) -> list[str]:
    """The slots that a technique owns."""
    return [slot for slot in SLOTS if slot in kind.answers()]


def asked(kind: type[Technique]) -> list[str]:
    """The hooks that a technique answers."""
    return [hook for hook in HOOKS if hook in kind.answers()]


def parts(kind: type[Technique]) -> tuple[str, str, dict[str, str]]:
    """Title, text and the named parts of the docstring of a technique's module."""
    title, _, text = inspect.getdoc(importlib.import_module(kind.__module__)).partition("\n")
    body, *rest = re.split(rf"^({'|'.join(PARTS)})s?: ", text.strip(), flags=re.MULTILINE)
    named = {name: " ".join(words.split()) for name, words in zip(rest[::2], rest[1::2], strict=True)}
    if missing := [name for name in PARTS if name not in named]:
        raise ValueError(f"{source(kind).name}: its docstring has no part {missing[0]!r}. Write '{missing[0]}: ...'.")
    return title.rstrip("."), markdown(body.strip()), {name: markdown(words) for name, words in named.items()}


def markdown(text: str) -> str:
    """A docstring's text as Markdown: single backticks, which indented blocks do without; addresses as links."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("    "):
            lines.append(line.replace("``", ""))
        else:
            line = re.sub(r"(?<![`<])(https?://[^\s,;)]+?)(?=[.,;:)]*(\s|$))", r"<\1>", line.replace("``", "`"))
            lines.append(re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"<https://arxiv.org/abs/\1>", line))
    return "\n".join(lines)


def meanings(kind: type[Technique]) -> dict[str, str]:
    """What each field means, from the part ``Args:`` of the class's docstring."""
    _, _, args = inspect.getdoc(kind).partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE)
    return {name: markdown(" ".join(words.split())) for name, words in found}


def bound(hint: Any) -> str:
    """What an annotation allows, in words."""
    if hasattr(hint, "__metadata__"):
        base, *metadata = get_args(hint)
        limits = [b for item in metadata for b in (item if isinstance(item, at.GroupedMetadata) else (item,))]
        signs = {at.Gt: ("gt", ">"), at.Ge: ("ge", ">="), at.Lt: ("lt", "<"), at.Le: ("le", "<=")}
        words = [f"{signs[type(b)][1]} {getattr(b, signs[type(b)][0])}" for b in limits if type(b) in signs]
        return f"{base.__name__} {' and '.join(words)}"
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        return " or ".join(f"`{option!r}`" for option in options)
    if options and type(None) in options:
        return " or ".join(bound(option) for option in options if option is not type(None)) + " or None"
    if options:
        return str(hint).replace("|", "or")
    return hint.__name__


def fields(kind: type[Technique]) -> Iterator[tuple[str, str, str, str]]:
    """Name, default, bound and meaning of each hyperparameter."""
    hints, meaning = get_type_hints(kind, include_extras=True), meanings(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in meaning:
            raise ValueError(f"{kind.__name__}.{field.name}: its meaning is not said. Add it to 'Args:' of the class.")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, f"`{default!r}`", bound(hints[field.name]), meaning[field.name]


def measured(kind: type[Technique], records: Records) -> list[str]:
    """A line for each arm of the records that the technique is in, and each finding, negative results included."""
    arms = [
        measurement(name, document, arm)
        for name, document, arm in evidence.candidates(records)
        if kind.__name__ in evidence.techniques_of(arm)
    ]
    return arms + [
        f"[{name}](../evidence/{name}.json), {finding['workload']}: {finding['text']}. "
        f"{seeds(document)}, {document['machine']}, {document['date']}."
        for name, document, finding in evidence.findings(kind.__name__, records)
    ]


def measurement(name: str, document: Record, arm: Arm) -> str:
    """What a record says of an arm."""
    alone = len(evidence.techniques_of(arm)) == 1
    which = f"`{arm['name']}`" if alone else f"within `{arm['name']}` ({', '.join(evidence.techniques_of(arm))})"
    args = ", ".join(f"{key} {value}" for key, value in arm["args"].items())
    metric = document["metric"].removeprefix("eval_")
    baseline = "the tuned baseline" if document["tuned"] else "a baseline that was not tuned"
    return (
        f"[{name}](../evidence/{name}.json), {which}{f' with {args}' if args else ''}: "
        f"**{evidence.speed_up(document, arm)}** in {evidence.cost_label(document['cost'])} at equal {metric} against "
        f"{baseline}; {evidence.verdict(document, arm)}. {seeds(document)}, {document['machine']}, {document['date']}."
    )


def seeds(document: Record) -> str:
    """How many there were."""
    count = len(document["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("---|", "---|")


def facts(kind: type[Technique], records: Records) -> dict[str, Any]:
    """What tables say of a technique."""
    return {
        "technique": kind.__name__,
        "perspective": area(kind),
        "fidelity": kind.fidelity,
        "slots": owned(kind),
        "evidence": evidence.grade(kind.__name__, records),
    }


def card(kind: type[Technique], records: Records) -> str:
    """The card of one technique, in Markdown; its links are those of a file in ``docs/techniques``."""
    title, body, named = parts(kind)
    path = source(kind).relative_to(ROOT)
    hosts = ", ".join(f"`{name}`" for name in [*owned(kind), *asked(kind)])
    facts = [
        f"*Perspective*: {area(kind)}.",
        f"*Fidelity*: {kind.fidelity}, {FIDELITY[kind.fidelity]}.",
        f"*Slots and hooks*: {hosts}; it needs `AccelTrainer`."
        if hosts
        else "*Slots and hooks*: none; it works in a plain `Trainer(callbacks=[...])` as well.",
        f"*Evidence*: {evidence.grade(kind.__name__, records)}.",
        f"*Code*: [{path}](../../{path}).",
    ]
    limits = [f"Refused under {backend}: {reason}." for backend, reason in kind.refused_backends.items()]
    limits += [
        f"Known to fail `{check.removeprefix('check_')}` of the contract: {reason}."
        for check, reason in kind.expected_failed_checks.items()
    ]
    lines = [f"- {line}" for line in measured(kind, records)]
    values = table(("field", "default", "allowed", "meaning"), [(f"`{n}`", d, b, m) for n, d, b, m in fields(kind)])
    sections = [
        f"# {kind.__name__}",
        NOTE,
        title + ".",
        "\n".join(f"- {fact}" for fact in facts),
        body,
        *(f"**{name}.** {words[0].upper()}{words[1:]}" for name, words in named.items()),
        f"## Fields\n\n{values}",
        "## Limits\n\n" + ("\n".join(f"- {limit}" for limit in limits) or "None is known."),
        "## Measured here\n\n" + ("\n".join(lines) or "No record yet."),
    ]
    return "\n\n".join(sections) + "\n"
