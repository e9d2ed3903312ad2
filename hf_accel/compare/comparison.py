"""A comparison: candidates against a baseline.

    comparison = Comparison([Arm("pruned", Recipe(techniques=[InfoBatch(keep=0.5)]))], workload="digits")
    results = comparison.run()
    print(results.row("pruned").speed_ups["cpu_seconds"])

The baseline is trained at every horizon, each with its own warm-up and its own decay to zero; a candidate is trained at
one.  Placebos that are sized by what a candidate used start when the first seed is done.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_accel.clock import parse_budget
from hf_accel.compare import placebos, tuning
from hf_accel.compare.arms import Arm, ablations, read_arm, trainer_defaults
from hf_accel.compare.collect import Design, collect
from hf_accel.compare.execution import Execution, Progress
from hf_accel.compare.page import page
from hf_accel.compare.plan import Plan, Run
from hf_accel.compare.report import markdown
from hf_accel.compare.results import Records, Results
from hf_accel.compare.workloads import FromRecipe, Workload, build_workload
from hf_accel.metrics import greater_is_better
from hf_accel.recipe import Recipe

HORIZONS = (0.25, 0.5, 0.75, 1.0, 1.5)


@dataclass
class Comparison:
    """Candidates against a baseline, on a workload.

    Args:
        candidates: Arms, recipes, their paths, or techniques as Python writes them.
        workload: A workload or its name; None: task, model and data of the baseline's or the first recipe.  Its
            arguments are then the baseline's.
        baseline: Recipe that replaces the workload's tuned baseline.
        horizons: Shares of the nominal budget at which the baseline is trained.
        seeds: Number of seeds, or the seeds.
        metric: Metric of the evaluation; None: the workload's.
        greater_is_better: Direction of the metric; None: as the workload, Trainer or ``evaluate`` declares it.
        budget: Time limit, such as ``"20min"``; only whole seeds are reported.
        out: Folder of records and reports; an interrupted comparison continues from it.
        ablate: Leave out each technique of a recipe in turn.
        placebos: Run placebos for every candidate, and Trainer's untouched defaults at every horizon.
        tune: Trials for every arm (`hf_accel.compare.tuning`); the baseline counts as tuned from `tuning.TRIALS` on.
        scale: Scale of a workload given by name, ``cpu`` or ``gpu``.
        share: Share of the nominal budget for candidates, one of the horizons.  Use half for candidates that may be
            twice as fast, so that they end within the baseline's range.
        cost: Cost that speed-ups refer to; None: CPU seconds, or wall seconds on an accelerator.
        slots: Runs at a time; None: two on a CPU with several cores, else one.
    """

    candidates: Sequence[Arm | Recipe | str | Path]
    workload: str | Workload | None = None
    baseline: Recipe | str | Path | None = None
    horizons: Sequence[float] = HORIZONS
    seeds: int | Sequence[int] = 5
    metric: str | None = None
    greater_is_better: bool | None = None
    budget: str | None = None
    out: str | Path | None = None
    ablate: bool = False
    placebos: bool = True
    tune: int = 0
    scale: str = "cpu"
    share: float = 1.0
    cost: str | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        accelerated = torch.accelerator.is_available()
        self.cost = self.cost or ("wall_seconds" if accelerated else "cpu_seconds")
        self.slots = self.slots or (1 if accelerated else min(2, os.cpu_count() or 1))
        self.seeds = list(range(1, self.seeds + 1)) if isinstance(self.seeds, int) else list(self.seeds)
        self.horizons = sorted(set(self.horizons))
        self.seconds = None if self.budget is None else _seconds(self.budget)
        arms = [read_arm(candidate, self.share) for candidate in self.candidates]
        self._check(arms)
        if isinstance(self.baseline, str | Path):
            self.baseline = Recipe.load(self.baseline)
        own = self.baseline or Recipe()
        if self.workload is None:
            self.workload = FromRecipe.of(own if own.task else arms[0].recipe)
        elif isinstance(self.workload, str):
            self.workload = build_workload(self.workload, {"scale": self.scale})
        if (reason := self.workload.missing()) is not None:
            raise ValueError(reason)
        self._workload = self.workload
        declared = self.greater_is_better
        if declared is None and self.metric_name == self._workload.metric:
            declared = self._workload.greater_is_better
        self.lower_is_better = not greater_is_better(self.metric_name, declared)
        self.reference = Arm("baseline", own, "baseline").inherit(self._workload.baseline_args())
        self.arms = [arm.inherit(self.reference.recipe.args) for arm in arms]
        own_baseline = self.baseline is None and self._workload.trials
        self.trials: dict[str, list[dict[str, Any]]] = {"baseline": self._workload.trials} if own_baseline else {}
        self.out = Path(self.out or Path("accel_output", f"compare-{self._workload.name}"))
        settings: dict[str, Any] = {"single_threaded": self.cost == "cpu_seconds"}
        if self.cost == "flops":
            settings["counts_operations"] = True
        if self.metric and self.metric_name != "eval_loss":
            settings["metric"] = self.metric
        self._plan = Plan(self._workload, self.horizons, self.seeds, settings)

    def _check(self, arms: Sequence[Arm]) -> None:
        assert not isinstance(self.seeds, int)
        if tuning.SEED in self.seeds:
            raise ValueError(f"seeds({tuning.SEED}): is the seed of tuning. Choose others.")
        if self.tune < 0:
            raise ValueError(f"tune({self.tune}): must be 0 or more. Use {2 * tuning.TRIALS}.")
        if not self.seeds:
            raise ValueError("seeds(0): must be at least 1. Use 5.")
        if len(self.horizons) < 2 or self.horizons[0] <= 0:
            raise ValueError(f"horizons({self.horizons}): must be two or more above 0. Use 0.25,0.5,0.75,1,1.5.")
        if not arms and not (self.tune and self.workload):
            raise ValueError("candidates: there are none. Give a recipe, or tune the baseline of a workload.")
        for share in [arm.horizon for arm in arms]:
            if share not in self.horizons:
                known = ", ".join(f"{horizon:g}" for horizon in self.horizons)
                raise ValueError(f"share({share}): is none of the horizons ({known}). Use one of them, or add it.")
        if len({arm.name for arm in arms} | {"baseline"}) <= len(arms):
            names = ", ".join(arm.name for arm in arms)
            raise ValueError(f"candidates: two have the same name ({names}). Rename a file.")

    @property
    def tuned(self) -> str:
        """How the baseline was tuned; empty if it was not."""
        if self.tune >= tuning.TRIALS:
            return f"{self.tune} trials for every arm of {tuning.SPACE}; seed {tuning.SEED}"
        return self._workload.tuned if self.baseline is None else ""

    @property
    def metric_name(self) -> str:
        """The metric, by its name in the evaluation."""
        name = Path(self.metric).name if self.metric else self._workload.metric
        return name if name.startswith("eval_") else f"eval_{name}"

    def plan(self, late: Sequence[Arm] = ()) -> list[Run]:
        """Return the runs in order, with those of ``late`` placebos; before tuning, with the arguments as given."""
        return self._plan.runs([*self._early_arms(), *late])

    def _early_arms(self) -> list[Arm]:
        arms = [self.reference, *self.arms]
        if self.ablate:
            arms += ablations(self.arms)
        if self.placebos:
            arms += placebos.planned_placebos(self.arms, self.reference.recipe)
            arms += trainer_defaults(self.reference)
        return arms

    def run(self, follow: Callable[[Progress], None] = lambda _: None) -> Results:
        """Make the runs that have no record yet, and write the reports."""
        assert isinstance(self.out, Path) and self.slots is not None
        execution = Execution(self.out, self.slots, self.seconds, self.cost == "cpu_seconds", follow)
        if self.tune:
            self._tune(execution)
        plan, late = self.plan(), []
        if self.placebos:
            first = execution.finish([run for run in plan if run.seed == plan[0].seed], later=plan)
            late = placebos.measured_placebos(self.arms, self.reference.recipe, first)
            plan = self.plan(late)
        found = execution.finish(plan)
        records = {(run.arm, run.horizon, run.seed): record for run, record in found.items()}
        results = self.collect([*self._early_arms(), *late], records)
        self.save(results)
        return results

    def _tune(self, execution: Execution) -> None:
        """Give every arm the best arguments of its own search."""

        def train(arms: list[Arm]) -> list[tuning.Outcome]:
            runs = [self._plan.run(arm, arm.horizon, tuning.SEED) for arm in arms]
            records = execution.finish(runs)
            if len(records) < len(runs):
                raise ValueError(f"budget({self.budget!r}): is too short for the tuning. Give more time.")
            return [self._outcome(records[run]) for run in runs]

        every = [self.reference, *self.arms]
        searches = tuning.tune(every, self.tune, train)
        self.trials = {name: search.record() for name, search in searches.items()}
        best = {name: search.values(search.best) for name, search in searches.items()}
        self.reference, *self.arms = [arm.changed(best[arm.name]) for arm in every]

    def _outcome(self, record: Mapping[str, Any]) -> tuning.Outcome:
        """Return a run's loss, which is infinite if it failed, and its cost."""
        value = record.get("metrics", {}).get(self.metric_name)
        cost = record.get("costs", {}).get(self.cost, math.nan)
        if value is None or not math.isfinite(value):
            return math.inf, cost
        return (value if self.lower_is_better else -value), cost

    def collect(self, arms: Sequence[Arm], records: Records) -> Results:
        """Collect the results of arms from their records."""
        assert not isinstance(self.seeds, int) and self.cost is not None
        design = Design(
            workload=self._workload,
            metric=self.metric_name,
            lower_is_better=self.lower_is_better,
            seeds=self.seeds,
            horizons=self.horizons,
            budget=self.budget,
            cost=self.cost,
            tuned=self.tuned,
            trials=self.trials,
            baseline_args=self.reference.recipe.args,
        )
        return collect(design, arms, records)

    def save(self, results: Results) -> None:
        """Write ``results.json``, ``report.md`` and ``report.html``."""
        assert isinstance(self.out, Path)
        (self.out / "results.json").write_text(json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n")
        (self.out / "report.md").write_text(markdown(results))
        (self.out / "report.html").write_text(page(results))


def compare(*candidates: Arm | Recipe | str | Path, **options: Any) -> Results:
    """Run a `Comparison`; options are its fields."""
    return Comparison(list(candidates), **options).run()


def _seconds(text: str) -> float:
    unit, amount = parse_budget(text)
    if unit != "seconds":
        raise ValueError(f"budget({text!r}): must be a time. Use, for example, '20min'.")
    return amount
