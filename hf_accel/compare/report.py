"""Results as text: a table for the terminal, and a report in Markdown; `hf_accel.compare.page` has the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from hf_accel.compare.arms import AT_EVERY_HORIZON
from hf_accel.compare.results import Results, Row, record
from hf_accel.evidence import caveats, cost_label, fair, sentence

DEFAULTS = "Trainer's untouched defaults with the workload's budget: what many people run, and no fair baseline."


@dataclass
class Cells:
    """A table of text; each row begins with the name of its arm."""

    headings: Sequence[str]
    rows: list[tuple[Row, list[str]]]

    def __len__(self) -> int:
        return len(self.rows)

    def markdown(self) -> list[str]:
        """Return its lines in Markdown."""
        texts = [self.headings, *(cells for _, cells in self.rows)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in texts]
        return [lines[0], "|" + " --- |" * len(self.headings), *lines[1:], ""]


def headings(results: Results) -> tuple[str, ...]:
    """Return the headings; only a baseline that was tuned over all free options is the best that Trainer can do."""
    claim = "over the best of Trainer" if fair(record(results)) else "over the baseline"
    return (
        *("arm", "horizon", "quality", "seconds", "over Trainer's defaults", claim, "at equal budget"),
        *("p", "set-up s", "step ms", "peak MiB"),
    )


def speed_ups(results: Results) -> Cells:
    """Return the baseline, then each candidate with its placebos and ablations."""
    return Cells(headings(results), [(row, _cells(row, results)) for row in ordered(results)])


def defaults(results: Results) -> Cells:
    """Return Trainer's untouched defaults."""
    rows = [row for row in results.rows if row.role == "defaults"]
    return Cells(headings(results), [(row, _cells(row, results)) for row in rows])


def other_costs(results: Results) -> Cells:
    """Return the speed-ups in costs other than the main one."""
    rows = [row for row in ordered(results) if row.speed_ups]
    costs = [cost for cost in dict.fromkeys(c for row in rows for c in row.speed_ups) if cost != results.cost]
    cells = [(row, [row.name, *(str(row.speed_ups.get(c, "")) for c in costs)]) for row in rows if costs]
    return Cells(["arm", *map(cost_label, costs)], cells)


def trials(results: Results) -> Cells:
    """Return every trial of every arm's search, with its options, loss and cost."""
    every = [(name, trial) for name, found in results.trials.items() for trial in found]
    options = list(dict.fromkeys(option for _, trial in every for option in trial))
    cells = [[name, *(_short(trial.get(option, "")) for option in options)] for name, trial in every]
    return Cells(["arm", *options], [(results.row(name), row) for (name, _), row in zip(every, cells, strict=True)])


def ordered(results: Results) -> list[Row]:
    """Return the baseline's rows, then each candidate's with those of its placebos and ablations."""
    rows = [row for row in results.rows if row.role == "baseline"]
    for row in results.rows:
        if row.role == "candidate":
            rows += [row, *(other for other in results.rows if other.of == row.name)]
    return rows


def sentences(results: Results) -> list[str]:
    """Return a sentence for each candidate."""
    document = record(results)
    return [sentence(document, arm) for arm in document["arms"] if arm["role"] == "candidate"]


def first_line(results: Results) -> str:
    """Say how the baseline was tuned, how many seeds there are, and whether runs are missing."""
    tuned = f"Baseline tuned: {results.tuned}." if results.tuned else "Baseline not tuned."
    part = "" if results.complete else " Not all runs were made: the time was up."
    return f"{tuned} {len(results.seeds)} seeds, {cost_label(results.cost)} of the training section.{part}"


def notes(results: Results) -> list[str]:
    """Explain the table of speed-ups."""
    return [
        "A speed-up is T(q) / t: the candidate reached quality q at cost t, the baseline of the same seed at cost "
        "T(q). T(q) is interpolated over the baseline's horizons, each with its own full learning-rate decay. "
        "Brackets are 95 % intervals (Student's t on logarithms over seeds, widened by the uncertainty of the "
        "interpolation). Outside the baseline's range there are bounds and misses, never numbers.",
        "Over Trainer's defaults, T comes from runs with Trainer's untouched arguments: what a user sees on the first "
        "day. The claim is the column beside it.",
        "At equal budget, non-inferior means that the difference to the baseline at the same horizon has a one-sided "
        f"95 % bound below {results.margin:g}. This margin was fixed in advance. The p-value of no speed-up is "
        "one-sided and adjusted for the number of candidates (Holm).",
    ]


def table(results: Results) -> Group:
    """Return the sentences and the table for a terminal."""
    title = f"Speed-up at equal {results.metric} on {results.workload}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("arm", overflow="fold")
    for heading in headings(results)[2:7]:
        shown.add_column(heading, justify="right" if heading in ("quality", "seconds") else "left")
    for row, (name, horizon, *rest) in [*speed_ups(results).rows, *defaults(results).rows]:
        style = {"baseline": "dim", "candidate": "bold"}.get(row.role, "")
        shown.add_row(f"{name} x {horizon}" if row.role in AT_EVERY_HORIZON else name, *rest[:5], style=style)
    return Group(*sentences(results), first_line(results), shown, *caveats(record(results)))


def markdown(results: Results) -> str:
    """Return ``report.md``."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    sections = {
        "Apart from the comparison": [DEFAULTS, "", *apart.markdown()] if (apart := defaults(results)) else [],
        "Counted in other costs": costs.markdown() if (costs := other_costs(results)) else [],
        "Trials": found.markdown() if (found := trials(results)) else [],
        "Caveats": [*(f"- {line}" for line in found), ""] if (found := caveats(record(results))) else [],
        "Baseline": [
            *(f"- `{name}`: `{value}`" for name, value in results.baseline_args.items()),
            *("", f"{results.machine}. Code {results.code}, {results.date}, {versions}.", ""),
        ],
    }
    lines = [
        *(f"# {results.workload}: speed-up at equal {results.metric}", ""),
        *(f"- {line}" for line in sentences(results)),
        *("", first_line(results), ""),
        *speed_ups(results).markdown(),
        *(line for note in notes(results) for line in (note, "")),
        *(line for name, found in sections.items() if found for line in (f"## {name}", "", *found)),
    ]
    return "\n".join(lines)


def _cells(row: Row, results: Results) -> list[str]:
    indent = "" if row.of is None else "- "
    return [
        indent + row.name,
        f"{row.horizon:g}",
        _number(row.quality, ".4f") + ("" if math.isnan(row.quality_sd) else f" ± {row.quality_sd:.4f}"),
        _number(row.costs[results.cost], ".2f"),
        str(row.over_defaults or ""),
        str(row.speed_ups.get(results.cost, "")),
        str(row.non_inferiority or ""),
        "" if row.p_value is None else "<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}",
        _number(row.set_up_seconds, ".2f"),
        _number(1000 * row.step_seconds, ".1f"),
        _number(row.peak_memory_bytes / 2**20, ",.0f"),
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
