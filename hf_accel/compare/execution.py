"""Execution of a comparison's runs: finds their records, and makes the missing ones while there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_accel.compare import cache
from hf_accel.compare.plan import Run
from hf_accel.compare.pool import run_jobs

Record = dict[str, Any]


@dataclass
class Progress:
    """Progress of a comparison in runs; ``seconds_left`` is an estimate, None until a run has ended."""

    done: int
    total: int
    seconds_left: float | None
    last: str


@dataclass
class Execution:
    """Makes and keeps records.

    Args:
        out: Folder with ``runs`` (records) and ``logs``.
        slots: Runs at a time.
        seconds: Time for all runs together; None: no limit.
        single_threaded: Whether runs have one thread.
        follow: Called with the progress, after every run.
    """

    out: Path
    slots: int
    seconds: float | None
    single_threaded: bool
    follow: Callable[[Progress], None]
    records: dict[Run, Record] = field(default_factory=dict)
    began: float = field(default_factory=lambda: time.monotonic())

    def finish(self, runs: Sequence[Run], later: Iterable[Run] = ()) -> dict[Run, Record]:
        """Return the records of runs, as far as time allows; ``later`` ones only count in the progress."""
        for folder in ("runs", "logs"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        for run in runs:
            if run not in self.records and (record := cache.load(run.record(self.out))) is not None:
                self.records[run] = record
        every = list(dict.fromkeys([*runs, *later]))
        self._tell(every, "")
        if missing := {run.record(self.out): run for run in runs if run not in self.records}:

            def done(job: dict[str, Any], status: int) -> None:
                run = missing[Path(job["record"])]
                self.records[run] = _read(job, status)
                self._refuse_a_baseline_that_only_fails(run, job)
                self._tell(every, f"{run.arm}, horizon {run.horizon:g}, seed {run.seed}")

            jobs = self._jobs(missing)
            run_jobs(jobs, min(self.slots, len(missing)), self.single_threaded, done, self.out / "logs")
        return {run: self.records[run] for run in runs if run in self.records}

    def _refuse_a_baseline_that_only_fails(self, run: Run, job: dict[str, Any]) -> None:
        if run.arm != "baseline" or self.records[run]["status"] == "finished":
            return
        if not any(r["status"] == "finished" for other, r in self.records.items() if other.arm == "baseline"):
            raise ValueError(f"baseline: a run failed, {self.records[run]['error']} See {job['log']}.")

    def _jobs(self, missing: Mapping[Path, Run]) -> Iterator[dict[str, Any]]:
        for path, run in missing.items():
            left = self._estimate([run]) or 0.0
            if self.seconds is not None and time.monotonic() - self.began + left > self.seconds:
                return
            path.unlink(missing_ok=True)  # the record of a run that failed
            log = self.out / "logs" / path.with_suffix(".log").name
            yield {"run": run.configuration, "record": str(path), "log": str(log)}

    def _estimate(self, runs: Iterable[Run]) -> float | None:
        """Estimate the seconds of some runs, one after another, from the finished ones."""

        def weight(run: Run) -> float:
            return run.horizon + 0.1  # a run's fixed cost is about a tenth of a full training

        known = [(r["whole_seconds"], weight(run)) for run, r in self.records.items() if r["status"] == "finished"]
        if not known:
            return None
        return sum(map(weight, runs)) * sum(seconds for seconds, _ in known) / sum(share for _, share in known)

    def _tell(self, runs: Sequence[Run], last: str) -> None:
        left = self._estimate(run for run in runs if run not in self.records)
        done = sum(run in self.records for run in runs)
        self.follow(Progress(done, len(runs), None if left is None else left / self.slots, last))


def _read(job: dict[str, Any], status: int) -> Record:
    """Read the record of a job."""
    record = cache.read(Path(job["record"]))
    if status != 0 or record is None:
        return {"status": "failed", "error": f"The process ended with status {status}."}
    return record
