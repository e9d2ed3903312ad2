"""``report.html``: the results as one page that needs nothing else, neither scripts nor fonts nor files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_accel import evidence
from hf_accel.compare.charts import SHAPES, Axis, Chart, swatch, whisker
from hf_accel.compare.record import record
from hf_accel.compare.report import APART, HEADINGS, apart, by_cost, cells, errors, first_line, notes, ordered
from hf_accel.compare.statistics import mean_interval
from hf_accel.evidence import said
from hf_accel.receipt import PHASES

if TYPE_CHECKING:
    from hf_accel.compare.results import Results, Row

PARTS = ("data", "forward", "backward", "optimizer", "techniques", "evaluation", "other")
"""Where time goes; ``other`` has saving, too."""


def page(results: Results) -> str:
    """The page."""
    title = f"{results.workload}: speed-up at equal {results.metric.removeprefix('eval_')}"
    sections = [
        ("Quality against cost", quality_chart(results)),
        ("Speed-up at equal quality", speed_up_table(results) + paragraphs(notes(results))),
        ("Ablation", ablation(results)),
        ("Training loss", loss_chart(results)),
        ("Where the time went", time_bars(results)),
        ("Counted in other costs", other_costs(results)),
        ("Apart from the comparison", defaults(results)),
        ("What went wrong", bullets(errors(results))),
        ("Baseline", facts(results.baseline_args)),
        ("Machine and versions", facts(about(results))),
    ]
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{headline(results)}\n{paragraphs([first_line(results)])}\n{body}\n</body>\n</html>\n"
    )


def looks(results: Results) -> dict[str, tuple[str, str]]:
    """Shape and style of each arm: a candidate's own, empty for its placebos, a cross for its ablations."""
    found = {"baseline": ("circle", "base")}
    for index, row in enumerate(row for row in results.rows if row.role == "candidate"):
        found[row.name] = SHAPES[index % 5], f"s{index % 6}"
    for row in results.rows:
        if row.of in found:
            shape, style = found[row.of]
            found[row.name] = ("cross", f"{style} dashed") if row.role == "ablation" else (shape, f"{style} hollow")
        found.setdefault(row.name, ("circle", "base hollow"))
    return found


def headline(results: Results) -> str:
    """A sentence for each candidate."""
    look = looks(results)
    document = record(results)
    lines = [
        f"<p>{swatch(*look[arm['name']])}{escape(evidence.sentence(document, arm))}</p>"
        for arm in document["arms"]
        if arm["role"] == "candidate"
    ]
    return '<div class="headline">\n' + "\n".join(lines) + "\n</div>"


# Charts ---------------------------------------------------------------------------------------------------------------


def quality_chart(results: Results) -> str:
    """Every run as a point, the baseline's mean as a line, and the way from each candidate to that line."""
    look, metric = looks(results), results.metric.removeprefix("eval_")
    runs = [run for run in results.runs if run["status"] == "finished" and run["arm"] in look]

    def quality(run: dict[str, Any]) -> float:
        value = run["metrics"].get(results.metric)
        return math.nan if value is None else value

    baseline = [quality(run) for run in runs if run["arm"] == "baseline"]
    low, high = np.nanmin(baseline), np.nanmax(baseline)
    low, high = low - 0.6 * (high - low), high + 0.6 * (high - low)
    inside = [value for run in runs if low <= (value := quality(run)) <= high]
    steep = results.lower_is_better and min(inside) > 0 and max(inside) / min(inside) > 3
    unit = said(results.cost)
    chart = Chart(
        Axis.over((run["costs"][results.cost] for run in runs), log=True, pad=0.06),
        Axis.over(inside, log=bool(steep)),
        f"{unit} of a run (logarithmic)",
        f"{metric}{', logarithmic' if steep else ''} ({'lower' if results.lower_is_better else 'higher'} is better)",
    )
    knots = [row for row in results.rows if row.role == "baseline"]
    elements = [chart.line([row.costs[results.cost] for row in knots], [row.quality for row in knots], "base")]
    for row in results.rows:
        found = row.speed_ups.get(results.cost)
        if row.role == "candidate" and found is not None and found.kind == "measured":
            paid = row.costs[results.cost]
            elements.append(chart.line([paid, paid * found.value], [row.quality] * 2, f"{look[row.name][1]} dashed"))
    order = {"baseline": 0, "candidate": 2}
    roles = {row.name: row.role for row in results.rows}
    for run in sorted(runs, key=lambda run: order.get(roles.get(run["arm"], ""), 1)):
        paid = run["costs"][results.cost]
        label = f"{run['arm']}, horizon {run['horizon']:g}, seed {run['seed']}"
        label += f": {metric} {quality(run):.4f} at {paid:.4g} {unit}"
        elements.append(chart.point(paid, quality(run), *look[run["arm"]], label))
    outside = sum(1 for run in runs if math.isfinite(quality(run))) - len(inside)
    text = "Each mark is a run; the line is the baseline's mean at its horizons. "
    text += f"A broken line leads from a candidate's mean to the cost at which the baseline is as good: {SIDES} "
    text += f"{outside} runs lie outside and are drawn at the edge." if outside else ""
    names = [row.name for row in [*shown(results), *apart(results)]]
    return legend(results, names) + figure(chart.draw(elements, "quality of every run against its cost"), text)


SIDES = "the further to the right it ends, the faster the candidate; to the left, the slower."


def loss_chart(results: Results) -> str:
    """The mean over seeds of the loss that was logged in training, against the share of the run."""
    look, curves = looks(results), {}
    grid = np.linspace(0, 1, 41)
    for row in shown(results):
        logs = [np.array(run["log"], float).T for run in runs_of(row, results) if len(run["log"]) > 1]
        if logs:
            shares = [log[0] / log[0][-1] for log in logs]
            losses = [np.interp(grid, x, log[1]) for x, log in zip(shares, logs, strict=True)]
            first = max(x[0] for x in shares)
            curves[row.name] = np.where(grid >= first - 1e-9, np.mean(losses, axis=0), math.nan)
    every = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    if not every:
        return ""
    steep = min(every) > 0 and max(every) / min(every) > 8
    scale = Axis.over(every, log=bool(steep), pad=0.03)
    chart = Chart(Axis(0, 1), scale, "share of the run's steps", "training loss" + " (logarithmic)" * bool(steep))
    lines = [chart.line(grid, curve, look[name][1]) for name, curve in curves.items()]  # type: ignore[arg-type]
    text = "Means over seeds, each run against its own length. A technique that changes what is trained on changes "
    text += "this loss, too: only the evaluation compares arms."
    return legend(results, list(curves), line=True) + figure(chart.draw(lines, "training loss against progress"), text)


def time_bars(results: Results) -> str:
    """Wall seconds of each arm by what they were spent on, as far as its runs were measured so."""
    bars = []
    for row in shown(results):
        hosted = dataclasses.replace(row, name=f"{row.name}, hosted")  # of a plain Trainer, which has no receipt
        split = [parts(run["phases"]) for run in runs_of(row, results) + runs_of(hosted, results) if run["phases"]]
        if split:
            bars.append((row.name, {part: float(np.mean([one[part] for one in split])) for part in PARTS}))
    if not bars:
        return ""
    longest = max(sum(bar.values()) for _, bar in bars)
    lines = []
    for name, bar in bars:
        pieces = "".join(
            f'<i class="p{index}" style="width:{100 * bar[part] / longest:.2f}%" '
            f'title="{part}: {bar[part]:.2f} s, {bar[part] / sum(bar.values()):.1%}"></i>'
            for index, part in enumerate(PARTS)
        )
        total = sum(bar.values())
        lines.append(f'<span>{escape(name)}</span><div class="bar">{pieces}</div><b>{total:.2f} s</b>')
    used = [(index, part) for index, part in enumerate(PARTS) if any(bar[part] > 0 for _, bar in bars)]
    key = "".join(f'<li><i class="p{index}"></i>{part}</li>' for index, part in used)
    silent = [row.name for row in shown(results) if row.name not in dict(bars)]
    text = "Wall seconds of a run, means over seeds. An arm without techniques is measured through AccelTrainer."
    text += f" Not measured by phase: {', '.join(silent)}." if silent else ""
    return f'<ul class="legend">{key}</ul>\n<div class="bars">{"".join(lines)}</div>\n{paragraphs([text])}'


def parts(phases: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, with all techniques as one."""
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for name, seconds in phases.items():
        part = name if name in PARTS else "other" if name in PHASES else "techniques"
        found[part] += seconds
    return found


def shown(results: Results) -> list[Row]:
    """An arm's row, once for the baseline."""
    return [results.row("baseline"), *(row for row in ordered(results) if row.role != "baseline")]


def runs_of(row: Row, results: Results) -> list[dict[str, Any]]:
    """The finished runs of a row."""
    return [
        run
        for run in results.runs
        if (run["arm"], run["horizon"], run["status"]) == (row.name, row.horizon, "finished")
    ]


def defaults(results: Results) -> str:
    """The rows that are nobody's baseline."""
    lines = [(row.role, cells(row, results)) for row in apart(results)]
    return table(HEADINGS, lines, {0: "name", 4: "text", 5: "text"}) + paragraphs([APART]) if lines else ""


# Tables ---------------------------------------------------------------------------------------------------------------


def speed_up_table(results: Results) -> str:
    """The table of all arms, with a picture of each interval."""
    found = [row.speed_ups.get(results.cost) for row in results.rows]
    ends = [end for s in found if s and s.kind != "miss" for end in (s.value, max(s.low, s.value / 3), s.high)]
    axis = Axis.over([*(min(end, 10.0) for end in ends), 0.9, 1.1], log=True)
    look, lines = looks(results), []
    for row in ordered(results):
        own = row.speed_ups.get(results.cost)
        picture = ""
        if own is not None and own.kind != "miss":
            picture = whisker(axis, own.value, own.low, own.high, *look[row.name])
        texts = cells(row, results)
        lines.append((row.role, [row.name, *texts[1:5], picture, *texts[5:]]))
    headings = (*HEADINGS[:5], "", *HEADINGS[5:])
    return table(headings, lines, {0: "name", 4: "text", 5: "picture", 6: "text"}, raw={5})


def ablation(results: Results) -> str:
    """What each technique adds to its recipe: the speed-up with all over that without it, seed by seed."""
    lines = []
    for row in results.rows:
        if row.role != "ablation" or row.of is None:
            continue
        whole, left = (r.speed_ups.get(results.cost) for r in (results.row(row.of), row))
        adds = ""
        if whole and left and whole.kind == left.kind == "measured" and len(whole.per_seed) == len(left.per_seed):
            logs = np.log(whole.per_seed) - np.log(left.per_seed)
            adds = "{:.2f}x [{:.2f}, {:.2f}]".format(*np.exp(mean_interval(logs)))
        lines.append((row.role, [row.name, str(whole or ""), str(left or ""), adds]))
    headings = ("arm", "with all", "without it", "what it adds")
    return table(headings, lines, {0: "name", 1: "text", 2: "text", 3: "text"}) if lines else ""


def other_costs(results: Results) -> str:
    """The speed-ups counted in other costs."""
    headings, rows = by_cost(results)
    lines = [(row.role, texts) for row, texts in rows]
    return table(headings, lines, dict.fromkeys(range(len(headings)), "text") | {0: "name"}) if lines else ""


def table(
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    kinds: dict[int, str],
    raw: Iterable[int] = (),
) -> str:
    """A table whose rows have a class each; columns without a kind are numbers."""

    def line(texts: Sequence[str], tag: str, said: Callable[[int, str], str]) -> str:
        return "".join(
            f'<{tag} class="{kinds.get(i, "number")}">{said(i, text)}</{tag}>' for i, text in enumerate(texts)
        )

    head = line(headings, "th", lambda _, text: escape(text))
    body = [
        f'<tr class="{role}">{line(texts, "td", lambda i, text: text if i in raw else escape(text))}</tr>'
        for role, texts in rows
    ]
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(
        [*body, "</tbody></table></div>\n"]
    )


def facts(values: dict[str, Any]) -> str:
    """Names and values."""
    lines = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{lines}</dl>" if values else ""


def about(results: Results) -> dict[str, Any]:
    """What the results hold for."""
    return {"date": results.date, "code": results.code, **results.versions, "machine": results.machine}


def legend(results: Results, names: Sequence[str], line: bool = False) -> str:
    """The marks of arms."""
    look, items = looks(results), []
    for name in names:
        shape, style = look[name]
        stroke = f'<line class="line {style}" x1="0" y1="8" x2="16" y2="8"/>'
        sign = f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{stroke}</svg>'
        items.append(f"<li>{sign if line else swatch(shape, style)}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>\n'


def figure(chart: str, caption: str) -> str:
    """A chart and what it shows."""
    return f"<figure>\n{chart}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def paragraphs(texts: Iterable[str]) -> str:
    """Paragraphs of plain text."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts; nothing where there are none."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else ""


STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --soft: #5c6670; --rule: #dfe3e8; --faint: #eef1f4; --base: #6b7580;
  --s0: #0072b2; --s1: #c94f00; --s2: #00845f; --s3: #b0528a; --s4: #9a6b00; --s5: #5b4fc4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --rule: #363c43; --faint: #22272c; --base: #95a0ab;
    --s0: #56b4e9; --s1: #ff8a4c; --s2: #35c79b; --s3: #e392c1; --s4: #e6b422; --s5: #a79bff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 2.2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.1rem; margin: 0 0 .7rem; }
section { margin-top: 2.4rem; padding-top: 1.3rem; border-top: 1px solid var(--rule); }
p, figcaption { margin: .5rem 0; max-width: 48rem; }
section p, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; overflow-x: auto; }
.headline { font-size: 1.12rem; margin: 0 0 .8rem; }
.headline p { margin: .15rem 0; max-width: none; }
.headline .swatch { margin-right: .5rem; }
.swatch { width: 14px; height: 14px; vertical-align: -1px; overflow: visible; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .4rem; padding: 0; }
.legend li { display: flex; align-items: center; gap: .4rem; font-size: .88rem; }
.legend i { width: 12px; height: 12px; border-radius: 2px; }
.chart { width: 100%; min-width: 620px; height: auto; display: block; }
.grid { stroke: var(--faint); stroke-width: 1; }
.tick, .axis { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 5 4; }
.line.hollow { stroke-dasharray: 2 3; }
.mark { fill: var(--c); stroke: var(--page); stroke-width: .8; }
.mark.hollow { fill: var(--page); }
.mark.hollow, .mark.dashed { stroke: var(--c); stroke-width: 1.5; }
.base { --c: var(--base); } .s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.whisker { width: 130px; height: 20px; display: block; }
.interval { stroke: var(--c); stroke-width: 2; }
.one { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; }
.scroll { overflow-x: auto; margin: 0 0 .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--rule); }
th, td { padding: .32rem .45rem; text-align: left; white-space: nowrap; vertical-align: middle; }
td { border-bottom: 1px solid var(--faint); }
.name { white-space: normal; min-width: 11rem; padding-left: 0; }
.number { text-align: right; }
.picture { padding: 0 .2rem; }
tr.baseline { color: var(--soft); } tr.candidate .name, tr.candidate .text { font-weight: 600; }
tr.placebo .name, tr.ablation .name { padding-left: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.4rem; margin: 0; font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr max-content; gap: .45rem .9rem;
  align-items: center; font-size: .88rem; max-width: 100%; }
.bars span { overflow-wrap: anywhere; max-width: 16rem; }
.bars b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 18px; } .bar i { height: 100%; }
.p0 { background: #56b4e9; } .p1 { background: #0072b2; } .p2 { background: #d55e00; } .p3 { background: #e69f00; }
.p4 { background: #009e73; } .p5 { background: #cc79a7; } .p6 { background: #a8b0b8; }
@media print { * { print-color-adjust: exact; } section { break-inside: avoid; } }
"""
