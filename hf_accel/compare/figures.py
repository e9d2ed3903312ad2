"""Figures of the report: matplotlib draws them as SVG, in colors that the page's style sheet defines."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from hf_accel.compare.report import ordered
from hf_accel.compare.results import Results, Row
from hf_accel.evidence import cost_label
from hf_accel.receipt import PHASES

COLORS = dict(page="#fffffe", ink="#1b1f24", soft="#5c6670", faint="#eef1f4", base="#6b7580")
ARMS = dict(s0="#0072b2", s1="#c94f00", s2="#00845f", s3="#b0528a", s4="#9a6b00", s5="#5b4fc4")
"""The page's variables; matplotlib draws in these colors, and `svg` writes the variables in their place."""

PARTS = dict(data="#56b4e9", forward="#0073b3", backward="#d55e00", optimizer="#e69f00", techniques="#009e73")
PARTS |= dict(evaluation="#cc79a7", other="#a8b0b8")
"""Parts of a run's time; ``other`` includes saving."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf-accel",
    "font.size": 9.5,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["faint"],
    "legend.frameon": False,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left", "bottom")},
    **{f"{axis}tick.color": COLORS["soft"] for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
}


def looks(results: Results) -> dict[str, Any]:
    """Choose how each arm is plotted: the marks of placebos are hollow, those of ablations are crosses."""
    found = {"baseline": _look("o", COLORS["base"])}
    for index, row in enumerate(row for row in results.rows if row.role == "candidate"):
        found[row.name] = _look("s^Dvo"[index % 5], list(ARMS.values())[index % 6])
    for row in results.rows:
        own = found.get(row.of or "")
        if own is not None and row.role == "ablation":
            found[row.name] = own | {"marker": "x", "linestyle": "--", "markeredgecolor": own["color"]}
        elif own is not None:
            hollow = {"markerfacecolor": COLORS["page"], "markeredgecolor": own["color"]}
            found[row.name] = own | {"linestyle": ":", **hollow}
        hollow = {"markerfacecolor": COLORS["page"], "markeredgecolor": COLORS["base"]}
        found.setdefault(row.name, found["baseline"] | hollow)
    return found


def arms(results: Results) -> list[Row]:
    """Return each arm's row in order, without Trainer's defaults; the baseline's at the nominal horizon."""
    return [results.row("baseline"), *(row for row in ordered(results) if row.role != "baseline")]


@matplotlib.rc_context(STYLE)
def quality(results: Results) -> tuple[str, int]:
    """Draw every run, the baseline's mean, and the way from each candidate to it; also count the runs at the edge."""
    look, metric, unit = looks(results), results.metric.removeprefix("eval_"), cost_label(results.cost)
    runs = [run for run in results.runs if run["status"] == "finished" and run["arm"] in look]
    runs = [run for run in runs if run["metrics"].get(results.metric) is not None]
    baseline = [run["metrics"][results.metric] for run in runs if run["arm"] == "baseline"]
    room = 0.6 * (max(baseline) - min(baseline))
    values = [run["metrics"][results.metric] for run in runs]
    shown = np.clip(values, min(baseline) - room, max(baseline) + room)
    figure, axes = _axes(4.4)
    for row in results.rows:
        own = row.speed_ups.get(results.cost)
        if row.role == "candidate" and own is not None and own.kind == "measured":
            paid = row.costs[results.cost]
            axes.plot([paid, paid * own.value], [row.quality] * 2, "--", color=look[row.name]["color"])
    knots = [row for row in results.rows if row.role == "baseline"]
    axes.plot([row.costs[results.cost] for row in knots], [row.quality for row in knots], color=COLORS["base"])
    titles, named = [], set()
    for run, value, y in zip(runs, values, shown, strict=True):
        name, paid = run["arm"], run["costs"][results.cost]
        label = "" if name in named else name
        (mark,) = axes.plot(paid, y, **look[name] | {"linestyle": "", "label": label})
        mark.set_gid(f"title-{len(titles)}")
        titles.append(
            f"{name}, horizon {run['horizon']:g}, seed {run['seed']}: {metric} {value:.4f} at {paid:.4g} {unit}"
        )
        named.add(name)
    _logarithmic(axes, "x")
    steep = results.lower_is_better and min(shown) > 0 and max(shown) / min(shown) > 3
    if steep:
        _logarithmic(axes, "y")
    better = "lower" if results.lower_is_better else "higher"
    axes.set_xlabel(f"{unit} of a run (logarithmic)")
    axes.set_ylabel(f"{metric}{', logarithmic' if steep else ''} ({better} is better)")
    _legend(axes)
    return svg(figure, "quality of every run against its cost", titles), int(np.sum(shown != values))


@matplotlib.rc_context(STYLE)
def intervals(results: Results) -> str:
    """Draw the speed-ups with their intervals; an end that is unknown runs to the edge."""
    look = looks(results)
    rows = [(row, row.speed_ups[results.cost]) for row in ordered(results) if results.cost in row.speed_ups]
    rows = [(row, found) for row, found in rows if found.kind != "miss"]
    if not rows:
        return ""
    figure, axes = _axes(0.8 + 0.3 * len(rows))
    for y, (row, found) in enumerate(rows):
        ends = [max(found.low, found.value / 3), found.value, min(found.high, found.value * 3)]
        (line,) = axes.plot(ends, [y] * 3, **look[row.name] | {"linestyle": "-"}, markevery=[1])
        line.set_gid(f"title-{y}")
    axes.axvline(1, color=COLORS["soft"], linestyle=":", linewidth=1)
    _logarithmic(axes, "x")
    axes.set_xlabel(f"speed-up in {cost_label(results.cost)} at equal quality (logarithmic)")
    _names(axes, [row.name for row, _ in rows])
    return svg(figure, "speed-ups with 95 % intervals", [f"{row.name}: {found}" for row, found in rows])


@matplotlib.rc_context(STYLE)
def losses(results: Results) -> str:
    """Draw the mean over seeds of the logged training loss against the share of the run."""
    look, curves, grid = looks(results), {}, np.linspace(0, 1, 41)
    for row in arms(results):
        logs = [np.array(run["log"], float).T for run in runs_of(row.name, row.horizon, results) if len(run["log"]) > 1]
        if logs:
            shares = [log[0] / log[0][-1] for log in logs]
            means = np.mean([np.interp(grid, x, log[1]) for x, log in zip(shares, logs, strict=True)], axis=0)
            curves[row.name] = np.where(grid >= max(x[0] for x in shares) - 1e-9, means, math.nan)
    every = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    if not every:
        return ""
    figure, axes = _axes(4.4)
    for name, curve in curves.items():
        axes.plot(grid, curve, **look[name] | {"marker": "", "label": name})
    steep = min(every) > 0 and max(every) / min(every) > 8
    if steep:
        _logarithmic(axes, "y")
    axes.set_xlabel("share of the run's steps")
    axes.set_ylabel(f"training loss{' (logarithmic)' if steep else ''}")
    _legend(axes)
    return svg(figure, "training loss against progress")


@matplotlib.rc_context(STYLE)
def times(results: Results) -> tuple[str, list[str]]:
    """Draw each arm's wall seconds by part; also name the arms without such a measurement."""
    split, silent, titles = {}, [], []
    for row in arms(results):
        # A plain Trainer has no receipt; the same arm through AccelTrainer has.
        runs = [run for name in (row.name, f"{row.name}, hosted") for run in runs_of(name, row.horizon, results)]
        if found := [parts(run["phases"]) for run in runs if run["phases"]]:
            split[row.name] = {part: float(np.mean([one[part] for one in found])) for part in PARTS}
        else:
            silent.append(row.name)
    if not split:
        return "", silent
    figure, axes = _axes(1.1 + 0.36 * len(split))
    for part, color in PARTS.items():
        if any(seconds[part] > 0 for seconds in split.values()):
            axes.barh(0, 0, color=color, label=part)
    for y, seconds in enumerate(split.values()):
        total, left = sum(seconds.values()), 0.0
        for part, value in seconds.items():
            (bar,) = axes.barh(y, value, 0.6, left, color=PARTS[part])
            bar.set_gid(f"title-{len(titles)}")
            titles.append(f"{part}: {value:.2f} s, {value / total:.1%}")
            left += value
        axes.annotate(f"{total:.2f} s", (total, y), (5, 0), textcoords="offset points", va="center")
    axes.set_xlabel("wall seconds of a run")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    _names(axes, list(split))
    _legend(axes)
    return svg(figure, "wall seconds of each arm by part", titles), silent


def parts(phases: dict[str, float]) -> dict[str, float]:
    """Add up the seconds of a receipt's phases by part."""
    found = dict.fromkeys(PARTS, 0.0)
    for name, seconds in phases.items():
        found[name if name in PARTS else "other" if name in PHASES else "techniques"] += seconds
    return found


def runs_of(name: str, horizon: float, results: Results) -> list[dict[str, Any]]:
    """Return the finished runs of an arm at a horizon."""
    return [run for run in results.runs if (run["arm"], run["horizon"], run["status"]) == (name, horizon, "finished")]


def svg(figure: Figure, label: str, titles: Sequence[str] = ()) -> str:
    """Return a figure for an HTML page; the artist with the id ``title-N`` shows the Nth title under the pointer."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r'<g id="title-(\d+)">', lambda found: f"<g><title>{escape(titles[int(found[1])])}</title>", text)
    # Only ids of markers are referenced; those of the rest would repeat in the next figure.
    text = re.sub(r'<style.*?</style>|<!--.*?-->| id="(?!m[0-9a-f]{10}")[^"]*"', "", text, flags=re.DOTALL)
    text = re.sub(r' (clip-path|xmlns(:\w+)?|width|height)="[^"]*"', "", text)
    for name, color in (COLORS | ARMS).items():
        text = text.replace(color, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _look(marker: str, color: str) -> Any:
    return {"marker": marker, "color": color, "markersize": 7, "markeredgecolor": COLORS["page"]}


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, height), layout="constrained", facecolor="none")
    return figure, figure.add_subplot(facecolor="none")


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (1, 1.1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 4 else (1, 1.5, 2, 3, 5, 7) if high / low < 50 else (1, 3)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _legend(axes: Axes) -> None:
    """Write the legend above the axes, in as many columns as its longest text allows."""
    longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=max(130 // (longest + 8), 1))


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Write names at the left, the first on top."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 30) for name in names], color=COLORS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
