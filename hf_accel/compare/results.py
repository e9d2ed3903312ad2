"""What a comparison found: a row for each arm, and the records that it rests on."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_accel.compare import cache
from hf_accel.compare.arm import Arm
from hf_accel.compare.statistics import NonInferiority, SpeedUp, non_inferiority, p_value, speed_up
from hf_accel.compare.workloads import Workload
from hf_accel.evidence import holm

COSTS = ("cpu_seconds", "wall_seconds", "flops", "tokens", "samples", "steps")

LOWER_IS_BETTER = ("loss", "perplexity", "error", "wer", "cer", "mse", "mae")
"""Endings of the names of metrics of which less is better; of all others, more is."""

Records = Mapping[tuple[str, float, int], Mapping[str, Any]]
"""Records of runs by arm, horizon and seed."""


@dataclass
class Row:
    """An arm, over its seeds; of an arm that the time did not allow, there are none.

    Args:
        quality: Mean of the metric.
        quality_sd: Standard deviation between seeds.
        costs: Mean of each cost.
        speed_ups: By cost; empty for the baseline, without a cost that was not counted in some run.
        non_inferiority: Against the baseline of the same horizon.
        p_value: Of "not faster than the baseline", one-sided, adjusted for the number of candidates; only theirs.
        p_unadjusted: The same of this candidate by itself.
        set_up_seconds: Part of the seconds that passed before the first step.
        step_seconds: Seconds of a step after that.
        peak_memory_bytes: Mean over seeds; on a CPU without what was resident before a trainer was built.
        errors: What went wrong, of runs that failed.
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
    non_inferiority: NonInferiority | None = None
    p_value: float | None = None
    p_unadjusted: float | None = None


@dataclass
class Results:
    """A finished comparison; ``placebos`` says whether it was to have any, ``complete`` whether all runs were made."""

    workload: str
    metric: str
    lower_is_better: bool
    margin: float
    cost: str
    tuned: str
    placebos: bool
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
        """The row of an arm; of the baseline, that of the nominal horizon."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(name)
        return min(found, key=lambda row: abs(row.horizon - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``results.json``; what is not finite is null."""
        return _plain(asdict(self))


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, judging from its name."""
    return metric.endswith(LOWER_IS_BETTER)


@dataclass(frozen=True)
class Design:
    """What a comparison compares, and by which measure.

    Args:
        budget: Seconds that the comparison itself may take, as it was given.
    """

    workload: Workload
    metric: str
    seeds: Sequence[int]
    horizons: Sequence[float]
    budget: str | None
    cost: str
    tuned: str
    placebos: bool
    trials: dict[str, list[dict[str, Any]]]
    baseline_args: dict[str, Any]


def collect(design: Design, arms: Sequence[Arm], records: Records) -> Results:
    """Results from the records that there are."""
    workload, metric = design.workload, design.metric
    known = {name for record in records.values() for name in record.get("metrics", {})}
    if known and metric not in known:
        shown = ", ".join(sorted(known - {"epoch"}))
        raise ValueError(f"metric({metric!r}): the evaluation has none of this name. It has {shown}.")
    lower = lower_is_better(metric)
    horizons = list(design.horizons)
    whole = [seed for seed in design.seeds if all(("baseline", h, seed) in records for h in horizons)]
    if not whole:
        raise ValueError(f"budget({design.budget!r}): too short for the baseline of one seed. Give more time.")
    sign = 1 if lower else -1

    def values(name: str, horizon: float, seeds: Sequence[int], read: Any) -> np.ndarray:
        """A number of each seed's run; NaN where it failed."""
        found = [records[name, horizon, seed] for seed in seeds]
        return np.array([read(r) if r["status"] == "finished" else math.nan for r in found], float)

    def quality(record: Mapping[str, Any]) -> float:
        value = record["metrics"].get(metric)
        return math.nan if value is None else value

    def row(arm: Arm, horizon: float, seeds: list[int]) -> Row:
        def mean(read: Any) -> float:
            return _mean(values(arm.name, horizon, seeds, read))

        def after(record: Mapping[str, Any]) -> float:
            charged = record["costs"][design.cost] - record["set_up"].get(design.cost, 0.0)
            return charged / max(record["costs"]["steps"], 1)

        qualities = values(arm.name, horizon, seeds, quality)
        finite = qualities[np.isfinite(qualities)]
        found = [records[arm.name, horizon, seed] for seed in seeds]
        return Row(
            name=arm.name,
            role=arm.role,
            of=arm.of,
            horizon=horizon,
            techniques=arm.recipe.techniques,
            seeds=seeds,
            quality=_mean(qualities),
            quality_sd=float(finite.std(ddof=1)) if len(finite) > 1 else math.nan,
            costs={cost: mean(lambda record, cost=cost: record["costs"][cost]) for cost in COSTS},
            set_up_seconds=mean(lambda record: record["set_up"].get(design.cost, math.nan)),
            step_seconds=mean(after),
            peak_memory_bytes=mean(lambda record: record["peak_memory_bytes"]),
            errors=sorted({record["error"] for record in found if "error" in record}),
        )

    margin = workload.margin if metric == workload.metric else 0.003 if lower else 0.002
    count_tokens(records)
    rows = []
    for arm in arms:
        if arm.role == "baseline":
            rows += [row(arm, horizon, whole) for horizon in horizons]
            continue
        seeds = [seed for seed in whole if (arm.name, arm.horizon, seed) in records]
        rows.append(row(arm, arm.horizon, seeds))
        if not seeds:
            continue
        losses = sign * values(arm.name, arm.horizon, seeds, quality)
        curves = sign * np.stack([values("baseline", h, seeds, quality) for h in horizons], axis=1)
        for cost in COSTS:

            def spent(record: Mapping[str, Any], cost: str = cost) -> float:
                return record["costs"][cost]

            paid = values(arm.name, arm.horizon, seeds, spent)
            costs = np.stack([values("baseline", h, seeds, spent) for h in horizons], axis=1)
            ended = [records[arm.name, arm.horizon, seed]["status"] == "finished" for seed in seeds]
            counted = np.append(costs, paid[ended])
            if (np.isfinite(counted) & (counted > 0)).all():
                rows[-1].speed_ups[cost] = speed_up(costs, curves, paid, losses)
        final = sign * values("baseline", arm.horizon, seeds, quality)
        rows[-1].non_inferiority = non_inferiority(losses, final, margin)
    candidates = [row for row in rows if row.role == "candidate" and design.cost in row.speed_ups]
    p_values = [p_value(row.speed_ups[design.cost]) for row in candidates]
    for candidate, own, adjusted in zip(candidates, p_values, holm(p_values), strict=True):
        candidate.p_unadjusted, candidate.p_value = own, adjusted
    return Results(
        workload=type(workload).name,
        metric=metric,
        lower_is_better=lower,
        margin=margin,
        cost=design.cost,
        tuned=design.tuned,
        placebos=design.placebos,
        trials=design.trials,
        baseline_args=design.baseline_args,
        seeds=whole,
        horizons=horizons,
        rows=rows,
        runs=[{"arm": name, "horizon": h, "seed": seed, **record} for (name, h, seed), record in records.items()],
        complete=len(whole) == len(design.seeds) and all(row.seeds == whole for row in rows),
        versions=cache.versions(),
        code=cache.code_hash(),
        machine=machine(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def count_tokens(records: Records) -> None:
    """Fill in the tokens of plain trainers, which count none: those of a sample, by the hosted baseline, for each."""
    for (name, _, _), record in records.items():
        if name == "baseline, hosted" and record["status"] == "finished":
            per_sample = record["costs"]["tokens"] / record["costs"]["samples"]
            for other in records.values():
                if other["status"] == "finished" and other["costs"]["tokens"] == 0:
                    other["costs"]["tokens"] = per_sample * other["costs"]["samples"]


def machine() -> str:
    """What the runs were made on: the accelerator, or the processor and the share of it that a run has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores, one thread a run"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _plain(value: Any) -> Any:
    """The same with None in the place of numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
