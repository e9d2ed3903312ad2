"""`hf_accel.meters.job`: the time limit of a job, counted from its start."""

from __future__ import annotations

import time

import pytest

from hf_accel import Budget
from hf_accel.testing import tiny_trainer


@pytest.fixture
def job(monkeypatch):
    """Begin a job that started ``passed`` seconds ago and may run for ``limit``."""

    def begin(passed, limit):
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(time.time() - passed))
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - passed + limit))

    return begin


def test_the_time_before_training_counts_and_is_no_progress(job, tmp_path):
    job(100, 101.5)
    trainer = tiny_trainer([Budget("job")], tmp_path)
    trainer.train()
    assert 101.5 * 0.95 < trainer.clock.seconds <= 101.5 + 0.5
    assert 100 <= trainer.clock.excluded_cost["seconds"] < 101
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] > 0.9 * 5e-3 and trainer.receipt.final_learning_rate == 0.0


def test_a_job_that_is_nearly_over(job, tmp_path):
    job(100, 100.01)
    with pytest.raises(ValueError, match=r"Budget\(limit='job'\): one step, and the evaluation .* do not fit"):
        tiny_trainer([Budget("job")], tmp_path).train()


def test_outside_of_a_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    with pytest.raises(ValueError, match="SLURM_JOB_START_TIME is not set. Give a time"):
        Budget("job")


def test_a_job_that_ends_before_it_starts(job):
    job(10, -1)
    with pytest.raises(ValueError, match="is not after"):
        Budget("job")
