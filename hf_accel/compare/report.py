"""The results for people: a table for the terminal, a report in Markdown; the page is in `hf_accel.compare.page`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from hf_accel import evidence
from hf_accel.compare.record import record
from hf_accel.evidence import said

if TYPE_CHECKING:
    from hf_accel.compare.results import Results, Row

HEADINGS = (
    "arm",
    "horizon",
    "quality",
    "seconds",
    "speed-up",
    "at equal budget",
    "p",
    "set-up s",
    "step ms",
    "peak MiB",
)


def first_line(results: Results) -> str:
    """What a reader must know before the table."""
    tuned = f"Baseline tuned: {results.tuned}." if results.tuned else "Baseline not tuned."
    part = "" if results.complete else " Not all runs were made: the time was up."
    return f"{tuned} {len(results.seeds)} seeds, {said(results.cost)} of the training section.{part}"


def cells(row: Row, results: Results) -> list[str]:
    """A row of the table."""
    indent = "" if row.of is None else "- "
    speed_up = row.speed_ups.get(results.cost)
    return [
        indent + row.name,
        f"{row.horizon:g}",
        _number(row.quality, ".4f") + ("" if math.isnan(row.quality_sd) else f" ± {row.quality_sd:.4f}"),
        _number(row.costs[results.cost], ".2f"),
        str(speed_up or ""),
        str(row.non_inferiority or ""),
        "" if row.p_value is None else "<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}",
        _number(row.set_up_seconds, ".2f"),
        _number(1000 * row.step_seconds, ".1f"),
        _number(row.peak_memory_bytes / 2**20, ",.0f"),
    ]


def ordered(results: Results) -> list[Row]:
    """The baseline, then each candidate with its placebos and ablations."""
    rows = [row for row in results.rows if row.role == "baseline"]
    for row in results.rows:
        if row.role == "candidate":
            rows += [row, *(other for other in results.rows if other.of == row.name)]
    return rows


def apart(results: Results) -> list[Row]:
    """Trainer's untouched defaults: what many people run, and nobody's baseline."""
    return [row for row in results.rows if row.role == "defaults"]


APART = "Trainer's untouched defaults with the workload's budget: what many people run, and no fair baseline."


def table(results: Results) -> Group:
    """For the terminal."""
    title = f"Speed-up at equal {results.metric} on {results.workload}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("arm", overflow="fold")
    for heading in HEADINGS[2:6]:
        shown.add_column(heading, justify="right" if heading in ("quality", "seconds") else "left", no_wrap=True)
    for row in [*ordered(results), *apart(results)]:
        style = {"baseline": "dim", "candidate": "bold"}.get(row.role, "")
        name, horizon, *rest = cells(row, results)
        shown.add_row(f"{name} x {horizon}" if row.role == "baseline" else name, *rest[:4], style=style)
    return Group(*sentences(results), first_line(results), shown, *errors(results))


def errors(results: Results) -> list[str]:
    """A sentence for each thing that went wrong."""
    return [f"{row.name}: {error}" for row in results.rows for error in row.errors]


def sentences(results: Results) -> list[str]:
    """What came out, a sentence for each candidate."""
    document = record(results)
    return [evidence.sentence(document, arm) for arm in document["arms"] if arm["role"] == "candidate"]


def notes(results: Results) -> list[str]:
    """How to read the table."""
    return [
        "A speed-up is T(q) / t: the candidate reached quality q at cost t, and T(q) is what the baseline of the same "
        "seed needs for it, interpolated over its horizons, each trained to the end of its own learning-rate decay. "
        "In brackets, 95 % intervals (Student's t on logarithms over seeds, widened by the doubt of the "
        "interpolation). Outside of the baseline's range there are bounds and misses, never numbers.",
        f"At equal budget: non-inferior where the one-sided 95 % bound of the difference to the baseline of the same "
        f"horizon is below {results.margin:g}, a margin that was fixed before. p is that of no speed-up, one-sided and "
        "adjusted for the number of candidates (Holm).",
    ]


def markdown(results: Results) -> str:
    """``report.md``."""
    lines = [
        f"# {results.workload}: speed-up at equal {results.metric}",
        "",
        *(f"- {line}" for line in sentences(results)),
        "",
        first_line(results),
        "",
        *_table(HEADINGS, [cells(row, results) for row in ordered(results)]),
        "",
        *(line for note in notes(results) for line in (note, "")),
    ]
    if rows := apart(results):
        lines += [
            "## Apart from the comparison",
            "",
            APART,
            "",
            *_table(HEADINGS, [cells(row, results) for row in rows]),
            "",
        ]
    headings, rows = by_cost(results)
    if rows:
        lines += ["## Counted in other costs", "", *_table(headings, [texts for _, texts in rows]), ""]
    if wrong := errors(results):
        lines += ["## What went wrong", "", *(f"- {line}" for line in wrong), ""]
    lines += [
        "## Baseline",
        "",
        *(f"- `{name}`: `{value}`" for name, value in results.baseline_args.items()),
        "",
        f"{results.machine}. Code {results.code}, {results.date}, "
        + ", ".join(f"{name} {version}" for name, version in results.versions.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def by_cost(results: Results) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """The speed-ups counted in other things than the main cost: headings, and the cells of each row."""
    rows = [row for row in ordered(results) if row.speed_ups]
    costs = [cost for cost in dict.fromkeys(c for row in rows for c in row.speed_ups) if cost != results.cost]
    headings = ["arm", *map(said, costs)]
    return headings, [(row, [row.name, *(str(row.speed_ups.get(c, "")) for c in costs)]) for row in rows if costs]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headings, *rows)]
    return [lines[0], "|" + " --- |" * len(headings), *lines[1:]]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
