"""Results of a comparison, and the record of evidence that `hf_accel.evidence` reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_accel.compare.statistics import NonInferiority, SpeedUp
from hf_accel.evidence import FORM, Record

COSTS = ("cpu_seconds", "wall_seconds", "flops", "tokens", "samples", "steps")

Records = Mapping[tuple[str, float, int], Mapping[str, Any]]
"""Records of runs by arm, horizon and seed."""


@dataclass
class Row:
    """Results of an arm at a horizon, over its seeds; there are none if the time was up.

    Args:
        quality: Mean of the metric.
        quality_sd: Standard deviation between seeds.
        costs: Mean of each cost.
        set_up_seconds: Seconds before the first step.
        step_seconds: Seconds per step after that.
        peak_memory_bytes: Mean over seeds; on a CPU without the memory resident before the trainer was built.
        errors: Errors of the runs that failed.
        speed_ups: By cost; empty for the baseline, and without costs that some run did not count.
        over_defaults: Speed-up of a candidate over Trainer's defaults, in the main cost.
        non_inferiority: Against the baseline at the same horizon.
        p_value: For candidates, one-sided p of "not faster than the baseline", adjusted for the number of candidates.
        p_unadjusted: The same for this candidate alone.
    """

    name: str
    role: str
    of: str | None
    horizon: float
    techniques: list[dict[str, Any]]
    seeds: list[int]
    quality: float
    quality_sd: float
    costs: dict[str, float]
    set_up_seconds: float
    step_seconds: float
    peak_memory_bytes: float
    errors: list[str]
    speed_ups: dict[str, SpeedUp] = field(default_factory=dict)
    over_defaults: SpeedUp | None = None
    non_inferiority: NonInferiority | None = None
    p_value: float | None = None
    p_unadjusted: float | None = None


@dataclass
class Results:
    """A finished comparison.

    Args:
        tuned: How the baseline was tuned; empty if it was not.
        level: Quality that the workload's baseline should reach; None if the workload states none.
        trials: Trials of the tuning, by arm.
        complete: Whether all runs were made.
        code: Hash of the code that runs execute.
    """

    workload: str
    metric: str
    lower_is_better: bool
    margin: float
    cost: str
    tuned: str
    level: float | None
    trials: dict[str, list[dict[str, Any]]]
    baseline_args: dict[str, Any]
    seeds: list[int]
    horizons: list[float]
    rows: list[Row]
    runs: list[dict[str, Any]]
    complete: bool
    versions: dict[str, str]
    code: str
    machine: str
    date: str

    def row(self, name: str) -> Row:
        """Return the row of an arm; for the baseline, at the nominal horizon."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(name)
        return min(found, key=lambda row: abs(row.horizon - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in ``results.json``; numbers that are not finite become None."""
        return mapped(asdict(self), lambda number: number if math.isfinite(number) else None)


def record(results: Results) -> Record:
    """Return a comparison without its logs; numbers have six digits."""
    document = results.to_dict()
    runs = {(run["arm"], run["horizon"], run["seed"]): run for run in document.pop("runs")}
    arms = document.pop("rows")
    for arm, row in zip(arms, results.rows, strict=True):
        own = [runs[arm["name"], arm["horizon"], seed] for seed in arm["seeds"]]
        given = own[0].get("run", {}).get("recipe", {}).get("args", {}) if own else {}
        arm["training_arguments"] = given
        arm["args"] = {key: value for key, value in given.items() if value != results.baseline_args.get(key)}
        arm["qualities"] = [run.get("metrics", {}).get(results.metric) for run in own]
        arm["paid"] = [run.get("costs", {}).get(results.cost) for run in own]
        for cost, speed_up in row.speed_ups.items():
            arm["speed_ups"][cost]["text"] = str(speed_up)
        if row.over_defaults is not None:
            arm["over_defaults"]["text"] = str(row.over_defaults)
    options = next(iter(runs.values())).get("run", {}).get("options", {})
    return mapped({"form": FORM, **document, "options": options, "arms": arms}, lambda number: float(f"{number:.6g}"))


def write_record(results: Results, path: str | Path) -> None:
    """Write a comparison's record as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(dumped(record(results)))


def dumped(document: Record) -> str:
    """Return a record as JSON, with each list of numbers on one line."""
    text = json.dumps(document, indent=1, allow_nan=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
    return text + "\n"


def mapped(value: Any, change: Callable[[float], float | None]) -> Any:
    """Change all floats in plain data."""
    if isinstance(value, dict):
        return {str(name): mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return change(value) if isinstance(value, float) else value
