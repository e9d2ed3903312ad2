"""Write the card of a technique from its docstrings, its fields and the records of comparisons.

The module docstring of a technique has a summary line, a body, and the sections in `SECTIONS`; the class docstring
explains each field in ``Args:``.  ``docs/write_a_technique.md`` describes both.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import annotated_types as at

import hf_accel
from hf_accel import evidence
from hf_accel.bounds import field_hints
from hf_accel.evidence import Arm, Record, Records
from hf_accel.recipe import known_techniques, write_technique
from hf_accel.recipe.technique_syntax import read_call
from hf_accel.technique import HOOKS, SLOTS, Technique

ROOT = Path(hf_accel.__file__).parents[1]
AREAS = {"data": "data", "model": "model", "optim": "optimization", "budget": "budgeted", "system": "system"}
"""Perspectives of the survey, by package."""
FIDELITY = {
    "exact": "the result is the same",
    "unbiased": "the expected gradient is the same",
    "lossy": "the result differs",
}
BACKENDS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero": "ZeRO"}
"""Names of the distributed backends."""
SECTIONS = (
    "Recommendation",
    "When to use",
    "When not to use",
    "Defaults",
    "Differences from the paper",
    "Example",
    "References",
)
"""Labels that may start a section of a technique's module docstring."""
OPTIONAL = ("Recommendation", "Defaults", "Example")
"""Sections that a card does without: a technique may have no fields, and most need no example of their own."""
BOOKKEEPING = ("output_dir", "report_to", "eval_strategy", "eval_steps", "save_strategy", "save_steps")
"""Arguments of an arm that do not affect its training."""
NOTE = "<!-- Written by docs/generate.py from the code. -->"


def in_order() -> list[tuple[str, type[Technique]]]:
    """List the techniques of `hf_accel` by perspective, then by name."""
    return sorted(known_techniques().items(), key=lambda item: (area(item[1]), item[0]))


def source(kind: type[Technique]) -> Path:
    """Return the file of a technique."""
    return Path(inspect.getfile(kind))


def area(kind: type[Technique]) -> str:
    """Return the perspective of a technique."""
    return AREAS[kind.__module__.split(".")[1]]


def owned(kind: type[Technique]) -> list[str]:
    """List the slots that a technique owns."""
    return [slot for slot in SLOTS if slot in kind.implemented_hooks()]


def asked(kind: type[Technique]) -> list[str]:
    """List the hooks that a technique implements."""
    return [hook for hook in HOOKS if hook in kind.implemented_hooks()]


def parts(kind: type[Technique]) -> tuple[str, str, dict[str, str]]:
    """Split the docstring of a technique's module into summary, body and sections by label."""
    summary, _, text = inspect.getdoc(importlib.import_module(kind.__module__)).partition("\n")
    body, *rest = re.split(rf"^({'|'.join(SECTIONS)}|Reference):[ \n]", text.strip(), flags=re.MULTILINE)
    found = {name: words.strip() for name, words in zip(rest[::2], rest[1::2], strict=True)}
    found["References"] = found.pop("Reference", found.get("References", ""))
    if "Differences from the paper" not in found:
        pattern = r"\s*\bDepartures?(?: from [^:]+)?:\s*"
        found["References"], *departures = re.split(pattern, found["References"], maxsplit=1)
        found["Differences from the paper"] = departures[0] if departures else "None stated."
    for name in SECTIONS:
        if name not in OPTIONAL and not found.get(name):
            raise ValueError(f"{source(kind).name}: its docstring has no section {name!r}. Write '{name}: ...'.")
    return summary, markdown(body.strip()), {name: sentences(found[name]) for name in SECTIONS if name in found}


def sentences(text: str) -> str:
    """Make Markdown of a section: a list, or a paragraph that starts with a capital."""
    text = markdown(text)
    if text.startswith(("- ", "`", "*")):
        return text
    return text[0].upper() + text[1:]


def markdown(text: str) -> str:
    """Make Markdown of a docstring: single backticks (none in indented blocks), and addresses as links."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("    "):
            lines.append(line.replace("``", ""))
        else:
            line = re.sub(r"(?<![`<])(https?://[^\s,;)]+?)(?=[.,;:)]*(\s|$))", r"<\1>", line.replace("``", "`"))
            lines.append(re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"<https://arxiv.org/abs/\1>", line))
    return "\n".join(lines)


def meanings(kind: type[Technique]) -> dict[str, str]:
    """Read the meaning of each field from ``Args:`` of the class docstring."""
    _, _, args = inspect.getdoc(kind).partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE)
    return {name: markdown(" ".join(words.split())) for name, words in found}


def sources(kind: type[Technique]) -> dict[str, str]:
    """Read the source of each default from the comment at the end of its line."""
    found = {}
    for parent in reversed(kind.__mro__):
        if "__dataclass_fields__" in vars(parent):
            lines = inspect.getsource(parent).splitlines()
            for statement in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
                if isinstance(statement, ast.AnnAssign):
                    _, _, comment = lines[statement.end_lineno - 1][statement.end_col_offset :].partition("# ")  # type: ignore[operator]
                    found[ast.unparse(statement.target)] = comment
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def bound(hint: Any) -> str:
    """Describe the values that an annotation allows."""
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
    """Yield name, default, bound and meaning of each hyperparameter."""
    hints, meaning = field_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in meaning:
            raise ValueError(
                f"{kind.__name__}.{field.name} has no description. Add it to 'Args:' of the class docstring."
            )
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, f"`{default!r}`", bound(hints[field.name]), meaning[field.name]


def measured(kind: type[Technique], records: Records) -> list[str]:
    """Write a line for each arm with the technique and for each finding, negative results included."""
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
    """Describe the result of one arm."""
    calls = [write_technique(*item) for entry in arm["techniques"] for item in entry.items()]
    which = f"`{calls[0]}`" if len(calls) == 1 else f"within `{arm['name']}` ({', '.join(calls)})"
    args = ", ".join(f"{key} {value}" for key, value in trained_with(arm["args"]).items())
    metric = document["metric"].removeprefix("eval_")
    baseline = "a baseline that was not tuned"
    if document["tuned"]:
        baseline = "the best of Trainer" if evidence.fair(document) else "a baseline that was tuned in part"
    return (
        f"[{name}](../evidence/{name}.json), {which}{f' with {args}' if args else ''}: "
        f"**{evidence.speed_up(document, arm)}** in {evidence.cost_label(document['cost'])} at equal {metric} against "
        f"{baseline}; {evidence.verdict(document, arm)}. {seeds(document)}, {document['machine']}, {document['date']}."
    )


def seeds(document: Record) -> str:
    """Say how many seeds a comparison used."""
    count = len(document["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Format a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("---|", "---|")


def facts(kind: type[Technique], records: Records) -> dict[str, Any]:
    """Return the entries of a technique in tables."""
    return {
        "technique": kind.__name__,
        "perspective": area(kind),
        "fidelity": kind.fidelity,
        "slots": owned(kind),
        "evidence": evidence.grade(kind.__name__, records),
    }


def call(kind: type[Technique]) -> str:
    """Give the Python expression that a user copies: the docstring's example, or every default that is set."""
    if example := parts(kind)[2].get("Example"):
        _, args, values = read_call(example.strip("`"))
    else:
        defaults = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        args, values = [], {name: value for name, value in defaults.items() if value not in (None, {}, [])}
    return f"{kind.__name__}({', '.join([*map(literal, args), *(f'{n}={literal(v)}' for n, v in values.items())])})"


def literal(value: Any) -> str:
    """Give a value as Python source with double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value).replace("'", '"')


def usage(kind: type[Technique]) -> str:
    """Show how to use a technique from Python, from the command line, and as a callback where that works."""
    name, expression = kind.__name__, call(kind)
    option = shlex.quote(expression.removesuffix("()"))
    hooks = [*owned(kind), *asked(kind)]
    blocks = [
        "```python\n"
        f"from hf_accel import AccelTrainer, {name}\n\n"
        f"{trainer_block('AccelTrainer', f'techniques=[{expression}]')}\n"
        "trainer.train()\n```",
        f"An unmodified script takes it from the command line:\n\n```bash\n"
        f"hf-accel run --technique {option} train.py\n```",
    ]
    if hooks:
        asks = ", ".join(f"`{hook}`" for hook in hooks)
        blocks.append(f"A plain `Trainer` cannot run it as a callback: Trainer has no hook for {asks}.")
    else:
        blocks.append(
            "A plain `Trainer` takes it as a callback:\n\n```python\n"
            f"{trainer_block('Trainer', f'callbacks=[{expression}]')}\n```"
        )
    return "\n\n".join(blocks)


def trainer_block(trainer: str, option: str) -> str:
    """Give the call that builds a trainer."""
    arguments = ["model=model", "args=args", "train_dataset=train_dataset", option]
    return f"trainer = {trainer}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def worked(kind: type[Technique], records: Records) -> str:
    """Tabulate the settings that were compared here, the fastest first, and name the source of the defaults."""
    found = [
        (name, document, arm)
        for name, document, arm in evidence.candidates(records)
        if kind.__name__ in evidence.techniques_of(arm)
    ]
    found.sort(key=lambda item: -item[2]["speed_ups"].get(item[1]["cost"], {"value": 0.0})["value"])
    rows = [
        (
            setting(kind, arm),
            f"[{name}](../evidence/{name}.json)",
            evidence.speed_up(document, arm),
            evidence.verdict(document, arm),
        )
        for name, document, arm in found
    ]
    lines = [table(("setting", "comparison", "speed-up", "verdict"), rows)] if rows else ["Not measured here yet."]
    alone = [(document, arm) for _, document, arm in found if len(evidence.techniques_of(arm)) == 1]
    if rows and not any(evidence.fair(document) and evidence.gained(document, arm) for document, arm in alone):
        lines.insert(0, "No setting of this technique alone has gained on the best of Trainer yet.")
    if defaults := parts(kind)[2].get("Defaults"):
        lines.append(f"Source of the defaults: {defaults[0].lower() + defaults[1:]}")
    elif not rows and any(sources(kind).values()):
        lines.append("The table above names the sources of the defaults.")
    return "\n\n".join(lines)


def setting(kind: type[Technique], arm: Arm) -> str:
    """Describe an arm: the technique's hyperparameters, the arguments that differ, and the other techniques."""
    values = {name: given for entry in arm["techniques"] for name, given in entry.items()}
    own = values.pop(kind.__name__)
    defaults = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    words = ", ".join(f"{name}={literal(value)}" for name, value in own.items() if value is not None)
    given = f"`{words}`" if words else ""
    if all(name in defaults and defaults[name] == value for name, value in own.items()):
        given = f"defaults ({given})" if given else "defaults"
    if args := trained_with(arm["args"]):
        given += " with `" + ", ".join(f"{name}={literal(value)}" for name, value in args.items()) + "`"
    return given + (f", beside {', '.join(f'`{name}`' for name in values)}" if values else "")


def trained_with(args: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arguments that do not affect training."""
    return {name: value for name, value in args.items() if name not in BOOKKEEPING}


def card(kind: type[Technique], records: Records) -> str:
    """Write the card of one technique, in Markdown; its links are those of a file in ``docs/techniques``."""
    summary, body, named = parts(kind)
    path = source(kind).relative_to(ROOT)
    hooks = ", ".join(f"`{name}`" for name in [*owned(kind), *asked(kind)])
    facts = [
        f"*Perspective*: {area(kind)}.",
        f"*Fidelity*: {kind.fidelity}, {FIDELITY[kind.fidelity]}.",
        f"*Slots and hooks*: {hooks or 'none'}.",
        f"*Evidence*: {evidence.grade(kind.__name__, records)}.",
        f"*Code*: [{path}](../../{path}).",
    ]
    limits = [f"Refused under {BACKENDS[backend]}: {reason}." for backend, reason in kind.refused_backends.items()]
    limits += [
        f"Fails `{check.removeprefix('check_')}` of the contract: {reason}."
        for check, reason in kind.expected_failed_checks.items()
    ]
    lines = [f"- {line}" for line in measured(kind, records)]
    origins = sources(kind)
    rows = [(f"`{name}`", *rest, origins[name]) for name, *rest in fields(kind)]
    header = ("hyperparameter", "default", "allowed", "meaning", "source of the default")
    values = table(header, rows) if rows else "None."
    opening = f"**{named['Recommendation']}**\n\n{summary}" if "Recommendation" in named else f"**{summary}**"
    sections = [
        f"# {kind.__name__}",
        NOTE,
        opening,
        "\n".join(f"- {fact}" for fact in facts),
        f"## Use it\n\n{usage(kind)}",
        f"## When to use\n\n{named['When to use']}",
        f"## When not to use\n\n{named['When not to use']}",
        f"## How it works\n\n{body}",
        f"## Hyperparameters\n\n{values}",
    ]
    if rows:
        sections.append(f"## Hyperparameters that worked\n\n{worked(kind, records)}")
    sections += [
        f"## Differences from the paper\n\n{named['Differences from the paper']}",
        "## Limits\n\n"
        + (
            "\n".join(f"- {limit}" for limit in limits)
            or "No backend is refused, and every check of the contract passes."
        ),
        "## Evidence\n\n" + ("\n".join(lines) or "No record yet."),
        f"## References\n\n{named['References']}",
    ]
    return "\n\n".join(sections) + "\n"
