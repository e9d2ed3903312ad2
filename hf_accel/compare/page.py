"""``report.html``: the results as one page without scripts, fonts or other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from hf_accel.compare import figures, report
from hf_accel.compare.results import Results, record
from hf_accel.compare.statistics import mean_interval
from hf_accel.evidence import caveats

QUALITY = (
    "Each mark is a run; the line is the baseline's mean at its horizons. A dashed line leads from a candidate's mean "
    "to the cost at which the baseline is as good. If it leads to the right, the candidate is faster; to the left, "
    "slower."
)
LOSS = (
    "Means over seeds, each run against its own length. A technique that changes the training examples changes this "
    "loss, too: only the evaluation compares arms."
)
TIME = "Means over seeds. An arm without techniques is measured through AccelTrainer."


def page(results: Results) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=f"{results.workload}: speed-up at equal {results.metric.removeprefix('eval_')}",
        sentences=report.sentences(results),
        first_line=report.first_line(results),
        sections={name: content for name, content in sections(results).items() if any(content.values())},
    )


def sections(results: Results) -> dict[str, dict[str, Any]]:
    """Return the content of each section; one without content is left out of the page."""
    (quality, outside), (times, silent) = figures.quality(results), figures.times(results)
    losses = figures.losses(results)
    apart = report.defaults(results)
    edge = f" {outside} runs lie outside and are drawn at the edge." if outside else ""
    unsplit = f" Not measured by part: {', '.join(silent)}." if silent else ""
    about = {"date": results.date, "code": results.code, **results.versions, "machine": results.machine}
    return {
        "Quality against cost": {"figure": quality, "notes": [QUALITY + edge]},
        "Speed-up at equal quality": {
            "figure": figures.intervals(results),
            "table": report.speed_ups(results),
            "notes": report.notes(results),
        },
        "Ablation": {"table": ablation(results)},
        "Training loss": {"figure": losses, "notes": [LOSS] if losses else []},
        "Where the time went": {"figure": times, "notes": [TIME + unsplit] if times else []},
        "Counted in other costs": {"table": report.other_costs(results)},
        "Trials": {"table": report.trials(results)},
        "Apart from the comparison": {"table": apart, "notes": [report.DEFAULTS] if apart else []},
        "Caveats": {"list": caveats(record(results))},
        "Baseline": {"facts": results.baseline_args},
        "Machine and versions": {"facts": about},
    }


def ablation(results: Results) -> report.Cells:
    """Return what each technique adds to its recipe: the speed-up with all over that without it, seed by seed."""
    rows = []
    for row in results.rows:
        if row.role != "ablation" or row.of is None:
            continue
        whole, left = (r.speed_ups.get(results.cost) for r in (results.row(row.of), row))
        adds = ""
        if whole and left and whole.kind == left.kind == "measured" and len(whole.per_seed) == len(left.per_seed):
            logs = np.log(whole.per_seed) - np.log(left.per_seed)
            adds = "{:.2f}x [{:.2f}, {:.2f}]".format(*np.exp(mean_interval(logs)))
        rows.append((row, [row.name, str(whole or ""), str(left or ""), adds]))
    return report.Cells(("arm", "with all", "without it", "what it adds"), rows)
