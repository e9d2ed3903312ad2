"""What is compared on: a model, data, a metric, and a baseline that was tuned beforehand."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_accel.compare.statistics import non_inferiority_margin

DATA_ROOT = "HF_ACCEL_DATA"
"""Environment variable with the folder of data sets that do not come with Python or scikit-learn."""

TUNED = Path(__file__).parent / "tuned"
"""Folder of the records of tuned baselines, ``NAME.json`` each."""


@dataclass
class Workload:
    """Base class; the fields of a subclass are its options.

    Everything that a comparison takes for granted is fixed here, before it runs: the baseline's arguments, the nominal
    horizon, the metric and the margin of non-inferiority.  Where the baseline was tuned, the record
    ``tuned/NAME.json`` beside this file takes the place of ``args`` (those that it names), ``tuned`` and
    ``seed_sigma``, at the scale ``cpu``; baselines of other scales are not tuned.

    Args:
        scale: ``cpu``: a run takes about 20 seconds on one core; ``gpu``: a larger model, more data, a longer horizon.
    """

    scale: Literal["cpu", "gpu"] = field(default="cpu", kw_only=True)

    name: ClassVar[str]

    scales: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {}}
    """By scale, what `build` reads as ``self.size``; ``budget`` and ``args`` in it have precedence over those below."""

    budget: ClassVar[str]
    """Nominal horizon, as `Budget` takes it; in samples or epochs, so that the batch size is free."""

    metric: ClassVar[str] = "eval_loss"
    """What the quality is, by its name in ``Trainer.evaluate()``; continuous where possible."""

    args: ClassVar[dict[str, Any]] = {}
    """The baseline's fields of ``TrainingArguments``; candidates inherit those that they do not set."""

    tuned: ClassVar[str] = ""
    """How ``args`` were found: space, trials, date.  Empty: they were not tuned, and every report says so."""

    seed_sigma: ClassVar[float] = 0.0
    """Standard deviation of the metric between seeds of the baseline, from seeds that no comparison uses."""

    margin_floor: ClassVar[float] = 0.003
    """The least margin: 0.003 nats, or 0.002 of an accuracy."""

    def __post_init__(self) -> None:
        if self.scale not in self.scales:
            known = " or ".join(map(repr, self.scales))
            raise ValueError(f"scale({self.scale!r}): the workload {self.name!r} has none of this name. Give {known}.")
        self.args = self.args | self.size.get("args", {})  # type: ignore[misc]
        record = TUNED / f"{self.name}.json"
        if self.scale == "cpu" and record.is_file():
            found = json.loads(record.read_text())
            self.args = self.args | found["args"]  # type: ignore[misc]
            self.tuned, self.seed_sigma = found["tuned"], found["seed_sigma"]  # type: ignore[misc]

    @property
    def size(self) -> dict[str, Any]:
        """What is particular to the scale."""
        return self.scales[self.scale]

    @property
    def margin(self) -> float:
        """How much worse is still called equal."""
        return non_inferiority_margin(self.seed_sigma, self.margin_floor)

    def nominal_budget(self) -> str:
        """The budget of horizon 1."""
        return self.size.get("budget", self.budget)

    def baseline_args(self) -> dict[str, Any]:
        """The baseline's arguments."""
        return dict(self.args)

    def missing(self) -> str | None:
        """Why it cannot run here, in a sentence with a remedy; None where it can."""
        return None

    def build(self) -> dict[str, Any]:
        """Keyword arguments of a Trainer: model, data sets, collator, metrics.  torch's generator is seeded before."""
        raise NotImplementedError


def data_file(*path: str) -> Path:
    """A file below the data root, which need not exist."""
    return Path(os.environ.get(DATA_ROOT, "data")).joinpath(*path)


def missing_file(*path: str) -> str | None:
    """The sentence for a file that is not there."""
    file = data_file(*path)
    if file.exists():
        return None
    return f"data({str(file)!r}): there is no such file. Set {DATA_ROOT}, or --data, to the folder of the data sets."


def missing_package(package: str, extra: str) -> str | None:
    """The sentence for a package that is not installed."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package}: is not installed. Install it with: pip install 'hf-accel[{extra}]'."
