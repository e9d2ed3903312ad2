"""Killed at random steps, and inside of a save, and resumed: the run ends as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import sys

import pytest
import torch
from ranks import run_on_ranks
from transformers import TrainerCallback

from hf_accel import (
    BatchSizeRamp,
    ExponentialMovingAverage,
    InfoBatch,
    LengthGrouped,
    Muon,
    SequenceLengthWarmup,
)
from hf_accel.checkpoints import format as ckpt
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of


def six():
    return [
        InfoBatch(),
        LengthGrouped(),
        BatchSizeRamp(),
        SequenceLengthWarmup(),
        ExponentialMovingAverage(),
        Muon(),
    ]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def train(directory, resume=False, dies_at=None, **args):
    trainer = tiny_trainer(six(), directory, save_strategy="steps", save_steps=3, save_total_limit=2, **args)
    if dies_at is not None:
        trainer.add_callback(DiesAt(dies_at))
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(trainer), losses_of(trainer), trainer.state.global_step


def in_a_child(fn, *args, **kwargs):
    """The exit code of a forked process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=fn, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.mark.ci
def test_killed_at_random_steps(tmp_path):
    weights, losses, steps = train(tmp_path / "straight")
    choose = random.Random(0)
    reached, kills = 0, []
    while reached + 3 < steps:
        step = choose.randint(max(reached, 3) + 1, min(reached + 9, steps - 1))
        assert in_a_child(train, tmp_path / "killed", bool(kills), step) == -signal.SIGKILL
        kills.append(step)
        reached = step
    assert len(kills) >= 3
    resumed, resumed_losses, _ = train(tmp_path / "killed", True)
    assert resumed_losses == losses
    assert largest_difference(resumed, weights) == 0.0


@pytest.mark.distributed
@pytest.mark.ci
def test_killed_at_random_steps_on_two_ranks(tmp_path):
    args = {"per_device_train_batch_size": 4}
    straight = run_on_ranks(train, tmp_path / "straight", **args)
    for resume, step in ((False, 8), (True, 17)):
        with pytest.raises(pytest.fail.Exception):
            run_on_ranks(train, tmp_path / "killed", resume, step, **args)
    resumed = run_on_ranks(train, tmp_path / "killed", True, **args)
    for (weights, losses, _), (again, losses_again, _) in zip(straight, resumed, strict=True):
        assert losses == losses_again
        assert largest_difference(weights, again) == 0.0


@pytest.mark.ci
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_inside_a_save(tmp_path, asynchronous):
    """Twenty kills at writes that are spread over a save: a whole checkpoint is found every time."""
    events = multiprocessing.get_context("fork").Value("i", 0)
    in_a_child(_train_counting_writes, tmp_path / "count", events, None, asynchronous)
    total = events.value
    assert total >= 20
    for i in range(20):
        directory = tmp_path / f"killed{i}"
        dies_at = 1 + i * (total - 1) // 19
        assert in_a_child(_train_counting_writes, directory, events, dies_at, asynchronous) == -signal.SIGKILL
        whole, _ = ckpt.newest_complete(directory)
        assert whole is not None and ckpt.integrity_error(whole) is None
        assert whole.name in ("checkpoint-3", "checkpoint-6")
        again = tiny_trainer(six(), directory, max_steps=7)
        assert again.accel.checkpoints.find(True, allow_changes=False) == str(whole)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7


def _train_counting_writes(directory, events, dies_at, asynchronous):
    """Train for 6 steps, saving at 3 and 6; die at a write of the second save."""
    trainer = tiny_trainer(six(), directory, save_strategy="steps", save_steps=3, save_total_limit=1, max_steps=6)
    trainer.accel.writer.in_background = asynchronous
    saving, seen = [False], [0]

    def audit(event, arguments):
        writes = event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "os.rmdir") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if saving[0] and writes:
            seen[0] += 1
            events.value = seen[0]
            if seen[0] == dies_at:
                die()

    sys.addaudithook(audit)
    save = type(trainer)._save_checkpoint

    def saved(model, trial):
        saving[0] = trainer.state.global_step == 6
        save(trainer, model, trial)
        trainer.accel.checkpoints.finish()
        saving[0] = False

    trainer._save_checkpoint = saved
    torch.set_num_threads(1)
    trainer.train()
