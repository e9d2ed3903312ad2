"""Collects results from the records of a comparison's runs."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_accel.compare import cache
from hf_accel.compare.arms import AT_EVERY_HORIZON, DEFAULTS, Arm
from hf_accel.compare.results import COSTS, Records, Results, Row
from hf_accel.compare.statistics import non_inferiority, p_value, speed_up
from hf_accel.compare.workloads import Workload
from hf_accel.evidence import holm

Read = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Design:
    """The facts about a comparison that its records do not hold; `Comparison` has the same fields."""

    workload: Workload
    metric: str
    lower_is_better: bool
    seeds: Sequence[int]
    horizons: Sequence[float]
    budget: str | None
    cost: str
    tuned: str
    trials: dict[str, list[dict[str, Any]]]
    baseline_args: dict[str, Any]

    @property
    def margin(self) -> float:
        """The difference in quality that does not matter."""
        own = self.metric == self.workload.metric
        return self.workload.margin if own else 0.003 if self.lower_is_better else 0.002

    @property
    def level(self) -> float | None:
        """The quality that the workload's baseline should reach; None if it states none."""
        return self.workload.quality if self.metric == self.workload.metric else None


def collect(design: Design, arms: Sequence[Arm], records: Records) -> Results:
    """Collect results from the records that there are."""
    known = {name for record in records.values() for name in record.get("metrics", {})}
    if known and design.metric not in known:
        shown = ", ".join(sorted(known - {"epoch"}))
        raise ValueError(f"metric({design.metric!r}): the evaluation does not compute it. Use one of: {shown}.")
    whole = [seed for seed in design.seeds if all(("baseline", h, seed) in records for h in design.horizons)]
    if not whole:
        raise ValueError(f"budget({design.budget!r}): too short for the baseline of one seed. Give more time.")
    count_tokens(records)
    measured, rows = Measured(design, records), []
    for arm in arms:
        for horizon in design.horizons if arm.role in AT_EVERY_HORIZON else [arm.horizon]:
            rows.append(measured.row(arm, horizon, [seed for seed in whole if (arm.name, horizon, seed) in records]))
            if arm.role != "baseline":
                measured.compare(rows[-1])
    candidates = [row for row in rows if row.role == "candidate" and design.cost in row.speed_ups]
    p_values = [p_value(row.speed_ups[design.cost]) for row in candidates]
    for row, own, adjusted in zip(candidates, p_values, holm(p_values), strict=True):
        row.p_unadjusted, row.p_value = own, adjusted
    return Results(
        workload=type(design.workload).name,
        metric=design.metric,
        lower_is_better=design.lower_is_better,
        margin=design.margin,
        cost=design.cost,
        tuned=design.tuned,
        level=design.level,
        trials=design.trials,
        baseline_args=design.baseline_args,
        seeds=whole,
        horizons=list(design.horizons),
        rows=rows,
        runs=[{"arm": name, "horizon": h, "seed": seed, **record} for (name, h, seed), record in records.items()],
        complete=whole == list(design.seeds) and all(row.seeds == whole for row in rows),
        versions=cache.versions(),
        code=cache.code_hash(),
        machine=cache.machine(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def count_tokens(records: Records) -> None:
    """Fill in the tokens of plain trainers, which count none: their samples times the tokens per hosted sample."""
    for (name, _, _), record in records.items():
        if name == "baseline, hosted" and record["status"] == "finished":
            per_sample = record["costs"]["tokens"] / record["costs"]["samples"]
            for other in records.values():
                if other["status"] == "finished" and other["costs"]["tokens"] == 0:
                    other["costs"]["tokens"] = per_sample * other["costs"]["samples"]


@dataclass(frozen=True)
class Measured:
    """Records as arrays.  Shape suffixes: ``S`` seeds, ``H`` horizons."""

    design: Design
    records: Records

    def values(self, name: str, horizon: float, seeds: Sequence[int], read: Read) -> np.ndarray:
        """Read a number from each seed's run; NaN where it failed."""
        found = [self.records[name, horizon, seed] for seed in seeds]
        return np.array([read(r) if r["status"] == "finished" else math.nan for r in found], float)

    def quality(self, record: Mapping[str, Any]) -> float:
        """Read the metric of a finished run."""
        value = record["metrics"].get(self.design.metric)
        return math.nan if value is None else value

    def row(self, arm: Arm, horizon: float, seeds: list[int]) -> Row:
        """Average an arm's runs at a horizon."""

        def mean(read: Read) -> float:
            return _mean(self.values(arm.name, horizon, seeds, read))

        def per_step(record: Mapping[str, Any]) -> float:
            charged = record["costs"][self.design.cost] - record["set_up"].get(self.design.cost, 0.0)
            return charged / max(record["costs"]["steps"], 1)

        qualities = self.values(arm.name, horizon, seeds, self.quality)
        finite = qualities[np.isfinite(qualities)]
        failed = [r for seed in seeds if "error" in (r := self.records[arm.name, horizon, seed])]
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
            set_up_seconds=mean(lambda record: record["set_up"].get(self.design.cost, math.nan)),
            step_seconds=mean(per_step),
            peak_memory_bytes=mean(lambda record: record["peak_memory_bytes"]),
            errors=sorted({record["error"] for record in failed}),
        )

    def compare(self, row: Row) -> None:
        """Fill in a row's comparison with the baseline, if it has seeds."""
        if not row.seeds:
            return
        sign = 1 if self.design.lower_is_better else -1
        losses_S = sign * self.values(row.name, row.horizon, row.seeds, self.quality)
        curves_SH = sign * self._curves("baseline", row.seeds, self.quality)
        ended_S = self._ended(row.name, row.horizon, row.seeds)
        ended_SH = np.stack([self._ended("baseline", h, row.seeds) for h in self.design.horizons], axis=1)
        for cost in COSTS:

            def read(record: Mapping[str, Any], cost: str = cost) -> float:
                return record["costs"][cost]

            paid_S, costs_SH = (
                self.values(row.name, row.horizon, row.seeds, read),
                self._curves("baseline", row.seeds, read),
            )
            counted = np.append(costs_SH[ended_SH], paid_S[ended_S])
            if (np.isfinite(counted) & (counted > 0)).all():
                row.speed_ups[cost] = speed_up(costs_SH, curves_SH, paid_S, losses_S)
            if row.role == "candidate" and cost == self.design.cost and self._has_defaults(row.seeds):
                default_losses_SH = sign * self._curves(DEFAULTS, row.seeds, self.quality)
                if np.isfinite(default_losses_SH).any(axis=1).all():
                    default_costs_SH = self._curves(DEFAULTS, row.seeds, read)
                    row.over_defaults = speed_up(default_costs_SH, default_losses_SH, paid_S, losses_S)
        final_S = sign * self.values("baseline", row.horizon, row.seeds, self.quality)
        row.non_inferiority = non_inferiority(losses_S, final_S, self.design.margin)

    def _curves(self, name: str, seeds: Sequence[int], read: Read) -> np.ndarray:
        return np.stack([self.values(name, h, seeds, read) for h in self.design.horizons], axis=1)

    def _ended(self, name: str, horizon: float, seeds: Sequence[int]) -> np.ndarray:
        return np.array([self.records[name, horizon, seed]["status"] == "finished" for seed in seeds])

    def _has_defaults(self, seeds: Sequence[int]) -> bool:
        return all((DEFAULTS, h, seed) in self.records for h in self.design.horizons for seed in seeds)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
