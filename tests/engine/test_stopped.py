"""Stopped from outside: one rank killed, a polite signal, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_disk import assert_a_full_disk_keeps_the_last_checkpoint
from transformers import TrainerCallback

from hf_accel import ExponentialMovingAverage, InfoBatch
from hf_accel.checkpoints import format as ckpt
from hf_accel.testing import largest_difference, tiny_trainer, weights_of

SCRIPT = """
import os, signal, sys
from transformers import TrainerCallback
from hf_accel import InfoBatch, ExponentialMovingAverage
from hf_accel.testing import tiny_trainer

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and args.process_index == 1 and "--die" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)

techniques = [InfoBatch(), ExponentialMovingAverage()]
args = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
trainer = tiny_trainer(techniques, sys.argv[1], **args)
trainer.add_callback(Dies())
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
trainer.save_model(sys.argv[1] + "/final")
"""


def launch(script, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        script,
        *arguments,
    ]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.distributed
@pytest.mark.full  # three times two processes
def test_one_of_two_ranks_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    straight = launch(script, tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr[-3000:]
    began = time.monotonic()
    killed = launch(script, tmp_path / "killed", "--die")
    assert killed.returncode != 0 and "Signal 9" in killed.stderr
    assert time.monotonic() - began < 120  # imports included
    assert ckpt.newest_complete(tmp_path / "killed")[0].name == "checkpoint-6"
    resumed = launch(script, tmp_path / "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    there, here = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(there[name], here[name]) for name in there)


class Signals(TrainerCallback):
    """What a scheduler does before it takes the machine away."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.ci
def test_a_polite_signal_saves_first(tmp_path):
    def make(directory, **args):
        return tiny_trainer([InfoBatch(), ExponentialMovingAverage()], directory, num_train_epochs=2, **args)

    straight = make(tmp_path / "straight")
    straight.train()
    before = signal.getsignal(signal.SIGTERM)
    stopped = make(tmp_path / "stopped", enable_jit_checkpoint=True)
    stopped.add_callback(Signals())
    stopped.train()
    assert stopped.state.global_step == 5  # the step after the one at whose end the signal came
    assert signal.getsignal(signal.SIGTERM) == before
    whole, passed_over = ckpt.newest_complete(tmp_path / "stopped")
    assert whole is not None and not passed_over
    resumed = make(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights_of(straight), weights_of(resumed)) == 0.0


@pytest.mark.ci
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    trainer = tiny_trainer([InfoBatch()], tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1)
    assert_a_full_disk_keeps_the_last_checkpoint(trainer, lambda: tiny_trainer([InfoBatch()], tmp_path))
