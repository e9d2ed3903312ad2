"""The plan of a comparison: its runs, and the order in which they start."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_accel.clock import parse_budget
from hf_accel.compare import cache
from hf_accel.compare.arms import AT_EVERY_HORIZON, Arm
from hf_accel.compare.workloads import DATA_ROOT, WORKLOADS, Workload


@dataclass(frozen=True)
class Run:
    """One training of an arm."""

    arm: str
    horizon: float
    seed: int
    configuration: dict[str, Any] = field(compare=False, repr=False)

    def record(self, out: Path) -> Path:
        """Return the path of its record, whether or not there is one."""
        name = re.sub(r"[^\w.+-]+", "-", self.arm).strip("-")[:60]
        return out / "runs" / f"{name}-{self.horizon:g}-{self.seed}-{cache.key(self.configuration)}.json"


class Plan:
    """Builds runs on one workload.

    Args:
        workload: Model, data and metric.
        horizons: Shares of the nominal budget at which the baseline is trained.
        seeds: Seeds of every arm.
        settings: Further entries of every run's configuration.
    """

    def __init__(
        self, workload: Workload, horizons: Sequence[float], seeds: Sequence[int], settings: dict[str, Any]
    ) -> None:
        kind = type(workload)
        options = {f.name: getattr(workload, f.name) for f in dataclasses.fields(workload)}
        self.horizons, self.seeds = horizons, seeds
        self._budget = parse_budget(workload.nominal_budget())
        self._files = cache.stamp([options, os.environ.get(DATA_ROOT)])
        self._settings = {
            "workload": kind.name if WORKLOADS.get(kind.name) is kind else f"{kind.__module__}:{kind.__name__}",
            "options": options,
            "data": os.environ.get(DATA_ROOT, ""),
            "machine": cache.machine(),
            **settings,
        }

    def run(self, arm: Arm, horizon: float, seed: int) -> Run:
        """Return one run of an arm."""
        unit, amount = self._budget
        configuration = self._settings | {
            "recipe": arm.recipe.to_dict(),
            "budget": f"{amount * horizon:.12g}{unit}",
            "seed": seed,
            "files": self._files + cache.stamp(arm.recipe.techniques),
        }
        return Run(arm.name, horizon, seed, configuration)

    def runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Return all runs, seed by seed and shuffled within a seed.

        A machine that slows down then slows all arms down, and a comparison that ends early has whole seeds.  The
        shortest baseline run comes first, because it shows mistakes and how long the others take.  It is followed by
        the baseline through AccelTrainer, whose receipt says where the baseline's time goes and counts its tokens.
        """
        arms, runs = list(arms), []
        for seed in self.seeds:
            of_seed = [
                self.run(arm, horizon, seed)
                for arm in arms
                for horizon in (self.horizons if arm.role in AT_EVERY_HORIZON else [arm.horizon])
            ]
            random.Random(seed).shuffle(of_seed)
            runs += of_seed
        first = min(runs, key=lambda run: (run.arm != "baseline", run.horizon))
        runs.remove(first)
        (reference,) = (arm for arm in arms if arm.role == "baseline")
        plain = self.run(reference, min(self.horizons, key=lambda horizon: abs(horizon - 1)), self.seeds[0])
        hosted = dataclasses.replace(
            plain, arm="baseline, hosted", configuration=plain.configuration | {"hosted": True}
        )
        return [first, hosted, *runs]
