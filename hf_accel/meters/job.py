"""Read the time limit of a batch system's job from its documented variables."""

from __future__ import annotations

import os

STARTED, ENDS = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
"""Seconds since 1970, from Slurm 22.05 or later."""


def job_start() -> float:
    """Return the job's start, in seconds since 1970."""
    return _number(STARTED)


def job_seconds() -> float:
    """Return the seconds from the job's start to its time limit."""
    started, ends = job_start(), _number(ENDS)
    if ends <= started:
        raise ValueError(f"Budget('job'): {ENDS} is not after {STARTED}. Give a time, for example '2h'.")
    return ends - started


def _number(name: str) -> float:
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(
            f"Budget('job') needs {STARTED} and {ENDS}, and {name} is not set. Give a time, for example '2h'."
        ) from None
