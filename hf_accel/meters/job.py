"""How long the job of a batch system may run, from the variables that it documents."""

from __future__ import annotations

import os
import time

STARTED, ENDS = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
"""Seconds since 1970, of Slurm from version 22.05 on."""


def job_seconds() -> float:
    """Seconds from the job's start to its time limit."""
    started, ends = (_number(name) for name in (STARTED, ENDS))
    if ends <= started:
        raise ValueError(f"Budget('job'): {ENDS} is not after {STARTED}. Say the time, for example '2h'.")
    return ends - started


def passed_seconds() -> float:
    """Seconds since the job's start."""
    return max(time.time() - _number(STARTED), 0.0)


def _number(name: str) -> float:
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(
            f"Budget('job'): the time limit of a job is known from {STARTED} and {ENDS}, and {name} is not set. "
            "Say the time, for example '2h'."
        ) from None
