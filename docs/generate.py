"""Writes the cards and the tables of techniques from the code and from ``docs/evidence/*.json``.

    python docs/generate.py

``docs/techniques/<stem>.md`` is the card of ``hf_accel/**/<stem>.py``, and ``docs/techniques.md`` the index.  The table
in the README is renewed between its markers; its column "what it saves" is written by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import annotated_types as at

from hf_accel.recipe import known_techniques
from hf_accel.technique import HOOKS, SLOTS, Technique

ROOT = Path(__file__).parents[1]
AREAS = {"data": "data", "model": "model", "optim": "optimization", "budget": "budgeted", "system": "system"}
"""Names of the five perspectives, by package."""
FIDELITY = {
    "exact": "the same result",
    "unbiased": "the same gradient in expectation",
    "lossy": "another result",
}
PARTS = ("Reference", "When to use", "When not to use")
MARKERS = ("<!-- techniques -->", "<!-- /techniques -->")
NOTE = "<!-- Written by docs/generate.py from the code. -->"


def main() -> None:
    """Write every document that `documents` gives, and remove cards of techniques that are gone."""
    written = documents()
    for path in (ROOT / "docs" / "techniques").glob("*.md"):
        if path not in written:
            path.unlink()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def documents() -> dict[Path, str]:
    """The text of each generated document."""
    techniques = known_techniques()
    docs = {card_path(kind): card(kind) for kind in techniques.values()}
    docs[ROOT / "docs" / "techniques.md"] = index(techniques)
    docs[ROOT / "README.md"] = readme((ROOT / "README.md").read_text(), techniques)
    return docs


def card_path(kind: type[Technique]) -> Path:
    """Where the card of a technique is."""
    return ROOT / "docs" / "techniques" / f"{source(kind).stem}.md"


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
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        yield field.name, f"`{default!r}`", bound(hints[field.name]), meaning[field.name]


def evidence(kind: type[Technique]) -> list[Path]:
    """The committed records that name a technique."""
    records = sorted((ROOT / "docs" / "evidence").glob("*.json"))
    return [path for path in records if re.search(rf"\b{kind.__name__}\b", path.read_text())]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("---|", "---|")


def card(kind: type[Technique]) -> str:
    """The card of one technique."""
    title, body, named = parts(kind)
    path = source(kind).relative_to(ROOT)
    hosts = ", ".join(f"`{name}`" for name in [*owned(kind), *asked(kind)])
    facts = [
        f"*Perspective*: {area(kind)}.",
        f"*Fidelity*: {kind.fidelity}, {FIDELITY[kind.fidelity]}.",
        f"*Slots and hooks*: {hosts}; it needs `AccelTrainer`."
        if hosts
        else "*Slots and hooks*: none; it works in a plain `Trainer(callbacks=[...])` as well.",
        f"*Code*: [{path}](../../{path}).",
    ]
    limits = [f"Refused under {backend}: {reason}." for backend, reason in kind.refused_backends.items()]
    limits += [
        f"Known to fail `{check.removeprefix('check_')}` of the contract: {reason}."
        for check, reason in kind.expected_failed_checks.items()
    ]
    records = [f"- [{record.stem}](../evidence/{record.name})" for record in evidence(kind)]
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
        "## Measured here\n\n" + ("\n".join(records) or "No record yet."),
    ]
    return "\n\n".join(sections) + "\n"


def index(techniques: dict[str, type[Technique]]) -> str:
    """The table of all techniques."""
    rows = [
        (
            f"[{name}](techniques/{source(kind).stem}.md)",
            area(kind),
            ", ".join(f"`{slot}`" for slot in owned(kind)) or "-",
            kind.fidelity,
            "reported",
        )
        for name, kind in in_order(techniques)
    ]
    return (
        "\n\n".join(
            [
                "# Techniques",
                NOTE,
                "At most one technique owns a slot; what has none composes freely. *Fidelity*: "
                + "; ".join(f"`{name}`, {words}" for name, words in FIDELITY.items())
                + ". *Evidence*: reported by others, until a record of ours says more.",
                table(("technique", "perspective", "slot", "fidelity", "evidence"), rows),
            ]
        )
        + "\n"
    )


def in_order(techniques: dict[str, type[Technique]]) -> list[tuple[str, type[Technique]]]:
    """By perspective, then by name."""
    areas = ["budgeted", "data", "model", "optimization", "system"]
    return sorted(techniques.items(), key=lambda item: (areas.index(area(item[1])), item[0]))


def readme(text: str, techniques: dict[str, type[Technique]]) -> str:
    """The README with its table renewed."""
    before, rest = text.split(MARKERS[0] + "\n")
    old, after = rest.split(MARKERS[1])
    saves = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]*\) \| \w+ \| ([^|]*) \|", old, re.MULTILINE))
    rows = []
    for name, kind in in_order(techniques):
        if name not in saves:
            raise ValueError(f"README: its table does not say what {name} saves. Add a row with 'what it saves'.")
        link = f"[`{name}`]({source(kind).relative_to(ROOT)})"
        rows.append((link, area(kind), saves[name], kind.fidelity, "reported"))
    header = ("technique", "perspective", "what it saves", "fidelity", "evidence")
    return f"{before}{MARKERS[0]}\n\n{table(header, rows)}\n\n{MARKERS[1]}{after}"


if __name__ == "__main__":
    main()
