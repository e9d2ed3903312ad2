"""A comparison: which runs it takes, in which order, and what they say.

    comparison = Comparison([Arm("pruned", Recipe(techniques=[InfoBatch(keep=0.5)]))], workload="digits")
    results = comparison.run()
    print(results.row("pruned").speed_ups["cpu_seconds"])

The baseline is trained at every horizon, with its warm-up and its decay to zero inside it; a candidate at the nominal
one.  Runs are ordered by seed and shuffled within a seed, so that a machine that slows down slows all arms down, and a
comparison that ends early has whole seeds.  Placebos whose size is what candidates take are known, and begin, after the
first seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_accel.clock import parse_budget
from hf_accel.compare import cache, placebos, tuning
from hf_accel.compare.arm import Arm
from hf_accel.compare.page import page
from hf_accel.compare.pool import run_jobs
from hf_accel.compare.report import markdown
from hf_accel.compare.results import Design, Results, collect, lower_is_better, machine
from hf_accel.compare.workloads import DATA_ROOT, WORKLOADS, Workload, build_workload
from hf_accel.recipe import Recipe, read_technique

HORIZONS = (0.25, 0.5, 0.75, 1.0, 1.5)

TECHNICAL = ("per_device_eval_batch_size", "remove_unused_columns", "label_names", "bf16", "fp16")
"""Arguments that say how a workload runs, not how well: the untouched defaults need them, too."""

SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
"""Arguments that a technique in the slot of the schedule takes the place of."""

OPTIMIZER = ("optim", "optim_args")
"""Arguments that a technique in the slot of the optimizer takes the place of."""

TRIALS = 4
"""The fewest that are called tuning: the arm as given, two other learning rates, another batch size."""


@dataclass(frozen=True)
class Run:
    """One training of an arm."""

    arm: str
    horizon: float
    seed: int
    configuration: dict[str, Any] = field(compare=False, repr=False)

    def record(self, out: Path) -> Path:
        """Where its record is, or will be."""
        name = re.sub(r"[^\w.+-]+", "-", self.arm).strip("-")[:60]
        return out / "runs" / f"{name}-{self.horizon:g}-{self.seed}-{cache.key(self.configuration)}.json"


@dataclass
class Progress:
    """How far a comparison is: runs, and an estimate of the seconds left, None until a run has ended."""

    done: int
    total: int
    seconds_left: float | None
    last: str


@dataclass
class Comparison:
    """Candidates against a baseline, on a workload.

    Args:
        candidates: Arms, recipes, their paths, or techniques as Python writes them.
        workload: Name of a workload, or one; None: task, model, data and, without techniques, arguments of the
            baseline's or the first recipe.
        baseline: Arm that takes the place of the workload's tuned baseline.
        horizons: Shares of the nominal budget at which the baseline is trained.
        seeds: How many, or which.
        metric: Another metric of the evaluation than the workload's.
        budget: Time that the comparison may take, as ``"20min"``; whole seeds are reported.
        out: Folder of records and reports; an interrupted comparison continues from it.
        ablate: Leave out each technique of a recipe in turn.
        placebos: Run placebos beside the candidates, and Trainer's untouched defaults.
        tune: Trials of learning rate and batch size for every arm, the baseline first (`hf_accel.compare.tuning`);
            from `TRIALS` on, the baseline counts as tuned.
        scale: Scale of a workload that is given by name, ``cpu`` or ``gpu``.
        share: Of the nominal budget, what candidates are trained for, one of the horizons; half of it where they may
            be twice as fast, so that they end within the baseline's range.
        cost: What speed-ups are of; None: CPU seconds, on an accelerator wall seconds.
        slots: Runs at a time; None: two on a CPU of several cores, else one.
    """

    candidates: Sequence[Arm | Recipe | str | Path]
    workload: str | Workload | None = None
    baseline: Recipe | str | Path | None = None
    horizons: Sequence[float] = HORIZONS
    seeds: int | Sequence[int] = 5
    metric: str | None = None
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
        if tuning.SEED in self.seeds:
            raise ValueError(f"seeds({tuning.SEED}): is the seed of tuning. Choose others.")
        if self.tune < 0:
            raise ValueError(f"tune({self.tune}): must be 0 or more. Eight trials are a fair start.")
        if len(self.seeds) < 1:
            raise ValueError(f"seeds({len(self.seeds)}): must be at least 1. Five are a fair start.")
        if len(self.horizons) < 2 or self.horizons[0] <= 0:
            raise ValueError(f"horizons({self.horizons}): must be two or more above 0. Give, say, 0.25,0.5,0.75,1,1.5.")
        if not self.candidates and not (self.tune and self.workload):
            raise ValueError("candidates: there are none. Give a recipe, or a workload to tune the baseline of.")
        self.seconds = None if self.budget is None else _seconds(self.budget)
        arms = [_arm(candidate, self.share) for candidate in self.candidates]
        for share in (*(arm.horizon for arm in arms), *([self.share] if self.placebos else [])):
            if share not in self.horizons:
                known = ", ".join(f"{horizon:g}" for horizon in self.horizons)
                raise ValueError(f"share({share}): is none of the horizons ({known}). Give one of them, or add it.")
        if isinstance(self.baseline, str | Path):
            self.baseline = Recipe.load(self.baseline)
        self.workload = self._find_workload([arm.recipe for arm in arms])
        if (reason := self.workload.missing()) is not None:
            raise ValueError(reason)
        self.options = {f.name: getattr(self.workload, f.name) for f in dataclasses.fields(self.workload)}
        self.files = cache.stamp([self.options, os.environ.get(DATA_ROOT)])
        own = Arm("baseline", self.baseline or Recipe(), "baseline")  # type: ignore[arg-type]
        self.reference = _inherit(own, self.workload.baseline_args())
        self.arms = [_inherit(arm, self.reference.recipe.args) for arm in arms]
        if len({arm.name for arm in self.arms} | {"baseline"}) <= len(self.arms):
            raise ValueError(f"candidates: two are called alike ({', '.join(a.name for a in arms)}). Rename a file.")
        self.trials: dict[str, list[dict[str, Any]]] = {}
        self.out = Path(self.out or Path("accel_output", f"compare-{self.workload.name}"))

    @property
    def tuned(self) -> str:
        """How the baseline was tuned; empty where it was not."""
        assert isinstance(self.workload, Workload)
        if self.tune >= TRIALS:
            return f"{self.tune} trials for every arm of {tuning.SPACE}; seed {tuning.SEED}"
        return self.workload.tuned if self.baseline is None else ""

    def _find_workload(self, recipes: list[Recipe]) -> Workload:
        if isinstance(self.workload, Workload):
            return self.workload
        if self.workload is not None:
            return build_workload(self.workload, {"scale": self.scale})
        chosen = self.baseline if isinstance(self.baseline, Recipe) and self.baseline.task else recipes[0]
        if chosen.task is None or chosen.model is None:
            raise ValueError("workload: none is named, and the recipe has no task and model. Add --workload NAME.")
        budgets = [chosen.budget] if isinstance(chosen.budget, str) else chosen.budget or []
        if len(budgets) != 1 or parse_budget(budgets[0])[0] == "seconds":
            raise ValueError(
                f"budget({chosen.budget!r}): a comparison needs one, not in seconds. Write, for example, '3epochs'."
            )
        options = {"task": chosen.task, "model": chosen.model, "data": chosen.data, "horizon": budgets[0]}
        workload = build_workload("recipe", options)
        workload.args = dict(chosen.args)  # type: ignore[misc]
        return workload

    # The plan -------------------------------------------------------------------------------------------------------

    def plan(self, late: Sequence[Arm] = ()) -> list[Run]:
        """The runs in order, those of late placebos as far as they are known; where arms are tuned, with their
        arguments before that."""
        first, *others = self._runs([*self._early_arms(), *late])
        return [first, self._hosted(), *others]

    def _early_arms(self) -> list[Arm]:
        return [self.reference, *self.arms, *self._ablations(), *self._early_placebos(), *self._defaults()]

    def _runs(self, arms: Iterable[Arm]) -> list[Run]:
        runs = []
        for seed in self.seeds:  # type: ignore[union-attr]
            of_seed = [
                Run(arm.name, horizon, seed, self._configuration(arm, horizon, seed))
                for arm in arms
                for horizon in (self.horizons if arm.role == "baseline" else [arm.horizon])
            ]
            random.Random(seed).shuffle(of_seed)
            runs += of_seed
        # The shortest run comes first: mistakes show early, and so does an estimate of the time.
        first = min(runs, key=lambda run: (run.arm != "baseline", run.horizon), default=None)
        return sorted(runs, key=lambda run: run is not first)

    def _hosted(self) -> Run:
        """The baseline through AccelTrainer: its receipt says where the baseline's time goes, and counts its tokens."""
        nominal, seed = min(self.horizons, key=lambda horizon: abs(horizon - 1)), self.seeds[0]  # type: ignore[index]
        configuration = self._configuration(self.reference, nominal, seed) | {"hosted": True}
        return Run("baseline, hosted", nominal, seed, configuration)

    def _configuration(self, arm: Arm, horizon: float, seed: int) -> dict[str, Any]:
        assert isinstance(self.workload, Workload)
        unit, amount = parse_budget(self.workload.nominal_budget())
        kind = type(self.workload)
        return {
            "workload": kind.name if WORKLOADS.get(kind.name) is kind else f"{kind.__module__}:{kind.__name__}",
            "options": self.options,
            "recipe": arm.recipe.to_dict(),
            "budget": f"{amount * horizon:.12g}{unit}",
            "seed": seed,
            "data": os.environ.get(DATA_ROOT, ""),
            "files": self.files + cache.stamp(arm.recipe.techniques),
            "machine": machine(),
            "single_threaded": self.cost == "cpu_seconds",
            **({"counts_operations": True} if self.cost == "flops" else {}),
            **({"metric": self.metric} if self.metric and self.metric_name != "eval_loss" else {}),
        }

    def _ablations(self) -> list[Arm]:
        if not self.ablate:
            return []
        arms = []
        for arm in self.arms:
            every = arm.recipe.techniques
            for left_out in every if len(every) > 1 else []:
                recipe = Recipe(args=arm.recipe.args, techniques=[entry for entry in every if entry is not left_out])
                name = f"{arm.name} without {next(iter(left_out))}"
                arms.append(Arm(name, recipe, "ablation", arm.name, arm.horizon))
        return arms

    def _defaults(self) -> list[Arm]:
        """Trainer's untouched defaults, which many people run; nothing where these are the baseline."""
        args = {name: value for name, value in self.reference.recipe.args.items() if name in TECHNICAL}
        if not self.placebos or args == self.reference.recipe.args:
            return []
        return [Arm("Trainer's defaults", Recipe(args=args), "defaults", horizon=self.share)]

    def _early_placebos(self) -> list[Arm]:
        found = [
            (arm, placebos.learning_rate_placebo(arm.recipe, self.reference.recipe) if self.placebos else None)
            for arm in self.arms
        ]
        return [Arm(f"baseline, LR of {a.name}", r, "placebo", a.name, a.horizon) for a, r in found if r is not None]

    def _late_placebos(self, records: dict[Run, dict[str, Any]]) -> list[Arm]:
        """Placebos whose size is what the candidates were measured to take."""
        arms, reference = [], self.reference.recipe

        def mean(name: str, horizon: float, value: Callable[[dict[str, Any]], float]) -> float:
            found = [
                value(r) for run, r in records.items() if (run.arm, run.horizon) == (name, horizon) and "costs" in r
            ]
            return statistics.fmean(found) if found else 0.0

        for arm in self.arms:

            def ratio(value: Callable[[dict[str, Any]], float], arm: Arm = arm) -> float:
                plain = mean("baseline", arm.horizon, value)
                return mean(arm.name, arm.horizon, value) / plain if plain else 0.0

            subset = placebos.random_subset_placebo(arm.recipe, reference, ratio(lambda r: r["costs"]["samples"]))
            batch = placebos.bigger_batch_placebo(reference, ratio(lambda r: r["peak_memory_bytes"]))
            for name, recipe in (("random subset", subset), ("bigger batch", batch)):
                if recipe is not None:
                    arms.append(Arm(f"{name}, as {arm.name}", recipe, "placebo", arm.name, arm.horizon))
        return arms

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Progress], None] = lambda _: None) -> Results:
        """Train what has no record yet, and write ``results.json`` and ``report.md``."""
        assert isinstance(self.out, Path)
        for folder in ("runs", "logs"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        if self.tune:
            self._tune(began, progress)
        plan, late, records = self.plan(), [], {}
        if self.placebos:
            first = [run for run in plan if run.seed == plan[0].seed]
            records = self._execute(first, began, progress, later=plan)
            late = self._late_placebos(records)
            plan = self.plan(late)
        records = self._execute(plan, began, progress, records)
        by_run = {(run.arm, run.horizon, run.seed): record for run, record in records.items()}
        results = collect(self._design(), [*self._early_arms(), *late], by_run)
        save(results, self.out)
        return results

    def _design(self) -> Design:
        workload: Any = self.workload
        seeds: Any = self.seeds
        return Design(
            workload=workload,
            metric=self.metric_name,
            seeds=seeds,
            horizons=self.horizons,
            budget=self.budget,
            cost=str(self.cost),
            tuned=self.tuned,
            placebos=self.placebos,
            trials=self.trials,
            baseline_args=self.reference.recipe.args,
        )

    def _tune(self, began: float, progress: Callable[[Progress], None]) -> None:
        """Give every arm the best arguments of its own search."""
        every = [self.reference, *self.arms]
        searches = {}
        for arm in every:
            args = arm.recipe.training_arguments()
            searches[arm.name] = tuning.Search(args.learning_rate, args.per_device_train_batch_size, self.tune)
        while True:
            trials = {}
            for arm in every:
                for point in searches[arm.name].proposals():
                    args = arm.recipe.args | searches[arm.name].args(point)
                    recipe = Recipe(args=args, techniques=arm.recipe.techniques)
                    name = f"{arm.name}, learning rate {args['learning_rate']:g}, batch "
                    trial = Arm(f"{name}{args['per_device_train_batch_size']}", recipe, horizon=arm.horizon)
                    configuration = self._configuration(trial, trial.horizon, tuning.SEED)
                    run = Run(trial.name, trial.horizon, tuning.SEED, configuration)
                    trials[run] = arm.name, point
            if not trials:
                break
            records = self._execute(list(trials), began, progress)
            if len(records) < len(trials):
                raise ValueError(f"budget({self.budget!r}): too short for the tuning. Give more time.")
            for run, (name, point) in trials.items():
                searches[name].losses[point] = self._loss(records[run])
        self.trials = {name: search.record() for name, search in searches.items()}
        self.reference, *self.arms = [
            dataclasses.replace(
                arm,
                recipe=Recipe(
                    args=arm.recipe.args | searches[arm.name].args(searches[arm.name].best),
                    techniques=arm.recipe.techniques,
                ),
            )
            for arm in every
        ]

    def _loss(self, record: dict[str, Any]) -> float:
        """The metric of a run, turned so that less is better; infinite where it failed."""
        value = record.get("metrics", {}).get(self.metric_name)
        if value is None or not math.isfinite(value):
            return math.inf
        return value if lower_is_better(self.metric_name) else -value

    @property
    def metric_name(self) -> str:
        """The metric, by its name in the evaluation."""
        assert isinstance(self.workload, Workload)
        name = Path(self.metric).name if self.metric else self.workload.metric
        return name if name.startswith("eval_") else f"eval_{name}"

    def _execute(
        self,
        runs: list[Run],
        began: float,
        progress: Callable[[Progress], None],
        records: dict[Run, dict[str, Any]] | None = None,
        later: Iterable[Run] = (),
    ) -> dict[Run, dict[str, Any]]:
        """Records of the runs: those that are there, and those that are made now, as far as the time allows.

        Of runs in ``records`` nothing is done; those that come ``later`` are only counted in what is told.
        """
        assert isinstance(self.out, Path) and self.slots is not None
        slots = self.slots
        records = dict(records or {})
        paths = {run: run.record(self.out) for run in runs if run not in records}
        records |= {run: record for run, path in paths.items() if (record := cache.load(path)) is not None}
        found = {run: record for run, record in records.items() if record["status"] == "finished"}
        missing = [run for run in runs if run not in records]
        every = list(dict.fromkeys([*runs, *later]))
        seconds: dict[Run, float] = {}

        def weight(run: Run) -> float:
            return run.horizon + 0.1  # what a run costs beside its training is about that

        def seconds_of(waiting: Iterable[Run]) -> float | None:
            """Wall seconds that runs will take, judging from those that ended."""
            known = [(seconds[run], weight(run)) for run in seconds]
            known += [(r["whole_seconds"], weight(run)) for run, r in found.items()]
            if not known:
                return None
            rate = sum(s for s, _ in known) / sum(w for _, w in known)
            return sum(map(weight, waiting)) * rate

        def tell(last: str) -> None:
            left = seconds_of(run for run in every if run not in records)
            progress(Progress(len(records), len(every), None if left is None else left / slots, last))

        def jobs():
            for run in missing:
                left = seconds_of([run])
                if self.seconds is not None and time.monotonic() - began + (left or 0.0) > self.seconds:
                    return  # whole seeds are reported
                paths[run].unlink(missing_ok=True)  # of a run that failed
                log = self.out / "logs" / paths[run].with_suffix(".log").name  # type: ignore[operator]
                yield {"run": run.configuration, "record": str(paths[run]), "log": str(log)}

        def done(job: dict[str, Any], status: int) -> None:
            run = next(run for run in missing if str(paths[run]) == job["record"])
            record: dict[str, Any] | None = cache.read(paths[run])
            if status != 0 or record is None:
                record = {"status": "failed", "error": f"the process ended with status {status}"}
            if record["status"] == "failed" and run.arm == "baseline":
                raise ValueError(f"baseline: a run failed, {record['error']} See {job['log']}.")
            records[run] = record
            if record["status"] == "finished":
                seconds[run] = record["whole_seconds"]
            tell(f"{run.arm}, horizon {run.horizon:g}, seed {run.seed}")

        if runs:
            tell("")
        if missing:
            run_jobs(jobs(), min(slots, len(missing)), self.cost == "cpu_seconds", done, self.out / "logs")
        return records


def compare(*candidates: Arm | Recipe | str | Path, **options: Any) -> Results:
    """Run a `Comparison`; options are its fields."""
    return Comparison(list(candidates), **options).run()


def _arm(candidate: Arm | Recipe | str | Path, share: float) -> Arm:
    """An arm from what a user may give."""
    if isinstance(candidate, Arm):
        return candidate
    if isinstance(candidate, Recipe):
        names = [name.rpartition(":")[2] for entry in candidate.techniques for name in entry]
        return Arm(" + ".join(names) or "candidate", candidate, horizon=share)
    text = str(candidate)
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return Arm(Path(text).stem, Recipe.load(text), horizon=share)
    name = text.rpartition(":")[2].removesuffix("()")
    return Arm(name, Recipe(techniques=[read_technique(text)]), horizon=share)


def _inherit(arm: Arm, args: dict[str, Any]) -> Arm:
    """The arm with arguments where it says nothing; its mistakes are found here."""
    techniques = arm.recipe.build_techniques()
    for slot, replaced in (("schedule", SCHEDULE), ("optimizer", OPTIMIZER)):
        if any(slot in technique.implemented_hooks() for technique in techniques):
            args = {name: value for name, value in args.items() if name not in replaced}
    recipe = Recipe(args=args | arm.recipe.args, techniques=arm.recipe.techniques)
    recipe.training_arguments()
    return dataclasses.replace(arm, recipe=recipe)


def _seconds(text: str) -> float:
    unit, amount = parse_budget(text)
    if unit != "seconds":
        raise ValueError(f"budget({text!r}): must be a time. Write, for example, '20min'.")
    return amount


def save(results: Results, folder: Path) -> None:
    """Write ``results.json``, ``report.md`` and ``report.html``."""
    (folder / "results.json").write_text(json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n")
    (folder / "report.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results))
