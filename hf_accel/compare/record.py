"""The record of a comparison, for docs/evidence."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hf_accel.compare.results import Results
from hf_accel.evidence.records import Record, rounded


def record(results: Results) -> Record:
    """A comparison without its logs."""
    document = results.to_dict()
    runs = {(run["arm"], run["horizon"], run["seed"]): run for run in document.pop("runs")}
    arms = document.pop("rows")
    del document["trials"]  # ``tuned`` says how many, and ``args`` what each arm got
    for arm, row in zip(arms, results.rows, strict=True):
        own = [runs[arm["name"], arm["horizon"], seed] for seed in arm["seeds"]]
        given = own[0].get("run", {}).get("recipe", {}).get("args", {}) if own else {}
        arm["args"] = {key: value for key, value in given.items() if value != results.baseline_args.get(key)}
        arm["qualities"] = [run.get("metrics", {}).get(results.metric) for run in own]
        arm["paid"] = [run.get("costs", {}).get(results.cost) for run in own]
        for cost, speed_up in row.speed_ups.items():
            arm["speed_ups"][cost]["text"] = str(speed_up)
    options = next(iter(runs.values())).get("run", {}).get("options", {})
    return rounded({**document, "options": options, "arms": arms})


def write_record(results: Results, path: str | Path) -> None:
    """Write a comparison's record, as JSON with a list of numbers on one line."""
    text = json.dumps(record(results), indent=1, allow_nan=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n")
