"""Workloads: a model, data, a metric, and a baseline tuned in advance."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow

from hf_accel.tasks.files import read_table

DATA_ROOT = "HF_ACCEL_DATA"
"""Environment variable with the folder of the data sets that come with neither Python nor scikit-learn."""

TUNED = Path(__file__).parent / "tuned"
"""Folder of the records of tuned baselines, ``NAME.json`` each."""


@dataclass
class Workload:
    """Base class; the fields of a subclass are its options.

    A workload fixes, before anything runs, the baseline's arguments, the nominal horizon, the metric and the margin of
    non-inferiority.  The record of a tuned baseline, ``tuned/NAME.json`` beside this file, replaces ``tuned``,
    ``seed_sigma``, ``quality``, ``trials`` and the ``args`` that it names, at the scale ``cpu``.  Baselines of other
    scales are not tuned.

    Args:
        scale: ``cpu``: a run takes about 20 seconds on one core; ``gpu``: a larger model, more data, a longer horizon.
    """

    scale: Literal["cpu", "gpu"] = field(default="cpu", kw_only=True)

    name: ClassVar[str]

    scales: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {}}
    """Sizes by scale, for `build`; ``budget`` and ``args`` override the class attributes."""

    budget: ClassVar[str]
    """Nominal horizon, as `Budget` takes it; in samples or epochs, so that it holds for all batch sizes."""

    metric: ClassVar[str] = "eval_loss"
    """Quality, by its name in ``Trainer.evaluate()``; continuous where possible."""

    greater_is_better: ClassVar[bool | None] = None
    """Whether more of the metric is better; None: as Trainer or ``evaluate`` declares."""

    args: ClassVar[dict[str, Any]] = {}
    """The baseline's fields of ``TrainingArguments``; candidates inherit those that they do not set."""

    tuned: ClassVar[str] = ""
    """How ``args`` were found: space, trials, date; empty if they were not tuned, which every report says."""

    seed_sigma: ClassVar[float] = 0.0
    """Standard deviation of the metric between seeds of the baseline, from seeds that no comparison uses."""

    quality: ClassVar[float | None] = None
    """Level that the baseline should reach at its longest horizon; None: none is stated."""

    trials: ClassVar[list[dict[str, Any]]] = []
    """Trials by which ``args`` were found."""

    margin_floor: ClassVar[float] = 0.003
    """Smallest margin: 0.003 nats, or 0.002 of an accuracy."""

    files: ClassVar[Sequence[str]] = ()
    """Files that it needs below the data root."""

    packages: ClassVar[dict[str, str]] = {}
    """Packages that it needs, with the extras that install them."""

    def __post_init__(self) -> None:
        if self.scale not in self.scales:
            known = " or ".join(map(repr, self.scales))
            raise ValueError(
                f"scale({self.scale!r}): the workload {self.name!r} does not support it. Set scale={known}."
            )
        self.args = self.args | self.size.get("args", {})  # type: ignore[misc]
        record = TUNED / f"{self.name}.json"
        if self.scale == "cpu" and record.is_file():
            found = json.loads(record.read_text())
            self.args = self.args | found["args"]  # type: ignore[misc]
            self.tuned, self.seed_sigma = found["tuned"], found["seed_sigma"]  # type: ignore[misc]
            self.quality, self.trials = found.get("quality"), found["trials"]  # type: ignore[misc]

    @property
    def size(self) -> dict[str, Any]:
        """The entry of ``scales`` for this scale."""
        return self.scales[self.scale]

    @property
    def margin(self) -> float:
        """The loss that does not matter: half the standard deviation between seeds, at least the floor."""
        return max(0.5 * self.seed_sigma, self.margin_floor)

    def nominal_budget(self) -> str:
        """Return the budget of horizon 1."""
        return self.size.get("budget", self.budget)

    def baseline_args(self) -> dict[str, Any]:
        """Return the baseline's arguments."""
        return dict(self.args)

    def missing(self) -> str | None:
        """Return why it cannot run here, in a sentence with a remedy; None if it can."""
        packages = (missing_package(package, extra) for package, extra in self.packages.items())
        return next(filter(None, (*packages, *map(missing_file, self.files))), None)

    def build(self) -> dict[str, Any]:
        """Return a Trainer's keyword arguments: model, data sets, collator, metrics; torch's generator is seeded."""
        raise NotImplementedError


def transformer(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the sizes of a transformer, by their names in configurations."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def sample(path: str, columns: list[str], limit: int | None) -> pyarrow.Table:
    """Read rows of a table below the data root: always the same random choice, in the same order."""
    table = read_table(str(data_file(path)), columns)
    return table.take(np.random.default_rng(0).permutation(len(table))[:limit])


def data_file(path: str) -> Path:
    """Return a path below the data root."""
    return Path(os.environ.get(DATA_ROOT, "data"), path)


def missing_file(path: str) -> str | None:
    """Return a sentence if there is no such file below the data root."""
    file = data_file(path)
    if file.exists():
        return None
    return f"data({str(file)!r}): there is no such file. Set {DATA_ROOT}, or --data, to the folder of the data sets."


def missing_package(package: str, extra: str) -> str | None:
    """Return a sentence if a package is not installed."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package}: is not installed. Install it with: pip install 'hf-accel[{extra}]'."
