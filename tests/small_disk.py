"""A disk that is full from a step on: no file may grow beyond a size, so writes fail."""

import resource
import signal

import pytest
from transformers import TrainerCallback

from hf_accel.checkpoints import format as ckpt

MOST_BYTES = 20_000
"""More than what is written in the loop of a tiny run, and less than a checkpoint."""


class FillsTheDisk(TrainerCallback):
    """Fill the disk after step 5, and after all checkpoints before it are complete."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.trainer.accel.checkpoints.finish()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def assert_a_full_disk_keeps_the_last_checkpoint(trainer, again):
    """Train with checkpoints at steps 3 and 6; then resume with the trainer ``again()``, on a disk with room."""
    trainer.add_callback(FillsTheDisk(trainer))
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        with pytest.raises(
            ckpt.CheckpointError, match=r"checkpoint-6: the checkpoint could not be written.*checkpoint-3"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    directory = trainer.args.output_dir
    newest, _ = ckpt.newest_complete(directory)
    assert newest is not None and newest.name == "checkpoint-3"
    resumed = again()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.clock.progress == 1.0
