"""Checkpoints that are written while training goes on."""

import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from small_disk import FillsTheDisk, assert_a_full_disk_keeps_the_last_checkpoint
from transformers import LlamaForCausalLM, TrainerCallback

from hf_accel import (
    AccelTrainer,
    DiLoCo,
    ExponentialMovingAverage,
    InfoBatch,
    LayerFreezing,
    Muon,
    PaddingFree,
    ProgressiveStacking,
    StochasticWeightAveraging,
)
from hf_accel.checkpoints import format as ckpt
from hf_accel.checkpoints.background import snapshot
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of


class Held(AccelTrainer):
    """Writes nothing of the checkpoint of a step before it is let go."""

    held_step = 6

    def __init__(self, *args, **kwargs):
        super().__init__(*args, async_checkpoints=True, **kwargs)
        self.gate = threading.Event()

    def _save(self, output_dir=None, state_dict=None):
        if self.state.global_step == self.held_step:
            self.accel.writer.put(self.gate.wait)  # before the weights, which are written first
        super()._save(output_dir, state_dict)


class Asynchronous(AccelTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, async_checkpoints=True, **kwargs)


def techniques():
    return [InfoBatch(), ExponentialMovingAverage(), Muon()]


def make(directory, kind=Asynchronous, given=techniques, **args):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12, "weight_decay": 0.1} | args
    return tiny_trainer(given(), directory, trainer_class=kind, **settings)


def trained(directory, *args, resume=None, **kwargs):
    trainer = make(directory, *args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_copy_is_apart_and_shares_what_was_shared():
    a = torch.arange(6.0)
    frozen = torch.ones(3)
    found = snapshot({"a": a, "again": [a, a[1:]], "frozen": frozen, "n": 3}, frozenset([frozen.data_ptr()]))
    a += 1
    assert torch.equal(found["a"], torch.arange(6.0)) and torch.equal(found["again"][1], torch.arange(1.0, 6))
    assert found["a"] is found["again"][0] and found["n"] == 3
    assert found["frozen"].data_ptr() == frozen.data_ptr()


def test_the_files_are_those_of_a_run_that_waits(tmp_path):
    there, here = trained(tmp_path / "there", AccelTrainer), trained(tmp_path / "here")
    assert losses_of(there) == losses_of(here)
    for step in (3, 6, 9, 12):
        waited, went_on = (tmp_path / name / f"checkpoint-{step}" for name in ("there", "here"))
        assert ckpt.integrity_error(went_on) is None
        for file in ("model.safetensors", "averaged.safetensors", "accel_state.safetensors"):
            first, second = load_file(waited / file), load_file(went_on / file)
            torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)
        LlamaForCausalLM.from_pretrained(went_on)


@pytest.mark.parametrize("given", [techniques, lambda: []])
def test_resumes_bit_exactly_with_it_and_without(tmp_path, given):
    straight = trained(tmp_path / "straight", given=given)
    for step, kind in ((3, Asynchronous), (9, AccelTrainer)):
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = trained(tmp_path / f"resumed{step}", kind, given, resume=checkpoint)
        assert losses_of(resumed) == losses_of(straight)
        assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_crafted_checkpoint_runs_no_code(tmp_path):
    trained(tmp_path / "run", given=lambda: [])
    checkpoint, made = tmp_path / "run" / "checkpoint-6", tmp_path / "made"
    assert not any(path.is_dir() for path in checkpoint.iterdir())
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Runs(made)))
    torch.save(Runs(made), checkpoint / "optimizer.pt")
    ckpt.mark_incomplete(checkpoint)
    ckpt.mark_complete(checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        trained(tmp_path / "run", given=lambda: [], resume=str(checkpoint))
    assert not made.exists()


class LetsGo(TrainerCallback):
    """Notes whether a held checkpoint is whole some steps later, and lets go."""

    def __init__(self, trainer, directory):
        self.trainer, self.directory, self.fault = trainer, directory, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            self.fault = ckpt.integrity_error(self.directory / "checkpoint-6")
            self.newest, _ = ckpt.newest_complete(self.directory)
            self.trainer.gate.set()


def test_training_goes_on_while_it_is_written(tmp_path):
    trainer = make(tmp_path / "held", Held, save_total_limit=1)
    trainer.add_callback(watch := LetsGo(trainer, tmp_path / "held"))
    trainer.train()
    assert watch.fault is not None and watch.newest.name == "checkpoint-3"
    assert [path.name for path in ckpt.checkpoints(tmp_path / "held")] == ["checkpoint-12"]
    again = make(tmp_path / "again", Held, max_steps=6)  # waits for the last one at the end
    again.gate.set()
    again.train()
    assert ckpt.newest_complete(tmp_path / "again")[0].name == "checkpoint-6"


def test_what_is_written_late_is_of_the_step_of_the_checkpoint(tmp_path):
    waits = trained(tmp_path / "waits", AccelTrainer)
    held = make(tmp_path / "held", Held)
    held.add_callback(LetsGo(held, tmp_path / "held"))
    held.train()
    assert losses_of(held) == losses_of(waits)
    resumed = trained(tmp_path / "resumed", resume=str(tmp_path / "held" / "checkpoint-6"))
    assert losses_of(resumed) == losses_of(waits)
    assert largest_difference(weights_of(resumed), weights_of(waits)) == 0.0


def test_the_configuration_is_of_the_step_of_the_checkpoint(tmp_path):
    def stacking():
        return [ProgressiveStacking(start=0.5, until=0.6)]

    kept = {}
    for kind in (AccelTrainer, Held):
        trainer = make(tmp_path / kind.__name__, kind, stacking, lr_scheduler_type="constant")
        if kind is Held:
            trainer.add_callback(LetsGo(trainer, tmp_path / kind.__name__))
        trainer.train()
        kept[kind] = LlamaForCausalLM.from_pretrained(tmp_path / kind.__name__ / "checkpoint-6")
        assert kept[kind].config.num_hidden_layers == 2 < trainer.model.config.num_hidden_layers
    assert largest_difference(*(model.state_dict() for model in kept.values())) == 0.0


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(directory):
    torch.set_num_threads(1)
    trainer = make(directory, Held, save_total_limit=1)
    trainer.add_callback(Dies())
    trainer.train()


def test_killed_while_it_is_written(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_train_and_die, args=(tmp_path / "killed",))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    whole, passed_over = ckpt.newest_complete(tmp_path / "killed")
    assert whole.name == "checkpoint-3" and list(passed_over) == ["checkpoint-6"]
    straight, resumed = trained(tmp_path / "straight"), trained(tmp_path / "killed", resume=True)
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0


@pytest.mark.parametrize("steps", [7, 12])  # found at the end of the run, and at the next checkpoint
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path, steps):
    def given():
        return [InfoBatch()]

    trainer = make(tmp_path, given=given, max_steps=steps, save_total_limit=1)
    assert_a_full_disk_keeps_the_last_checkpoint(trainer, lambda: make(tmp_path, given=given))
    assert trainer.state.global_step == min(steps, 9)


def test_the_best_model_is_the_one_that_was_written(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}
    runs = [trained(tmp_path / kind.__name__, kind, lambda: [], **args) for kind in (AccelTrainer, Asynchronous)]
    assert largest_difference(*map(weights_of, runs)) == 0.0
    assert runs[0].state.best_global_step == runs[1].state.best_global_step


# Several ranks --------------------------------------------------------------------------------------------------------


SECONDS = 100


def on_a_rank(directory, backend, resumes=(), kind=Asynchronous, given=None, **args):
    from ranks import assert_backend, backend_args

    given = given or (lambda: [InfoBatch(), ExponentialMovingAverage()])
    args = {"per_device_train_batch_size": 4} | backend_args(backend) | args
    runs = [make(directory / "straight", kind, given, **args)]
    runs[0].train()
    assert_backend(runs[0], backend)
    for step in resumes:
        runs.append(make(directory / f"resumed{step}", AccelTrainer if step == 9 else kind, given, **args))
        runs[-1].train(resume_from_checkpoint=str(directory / "straight" / f"checkpoint-{step}"))
    faults = [ckpt.integrity_error(path) for path in ckpt.checkpoints(directory / "straight")]
    return [losses_of(run) for run in runs], [_whole(run) for run in runs], faults


def _whole(trainer):
    from hf_accel import weights

    return weights.gather(trainer.model, weights.local_parameters(trainer.model))


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_two_ranks_resume_bit_exactly(tmp_path, backend):
    (losses, weights, faults), _ = run_on_ranks(on_a_rank, tmp_path, backend, (3, 9), backend=backend, timeout=SECONDS)
    assert faults == [None] * 4
    assert losses[0] == losses[1] == losses[2]
    assert largest_difference(weights[0], weights[1]) == 0.0 == largest_difference(weights[0], weights[2])
    waits = tmp_path / "waits"
    waiting = run_on_ranks(on_a_rank, waits, backend, (), AccelTrainer, backend=backend, timeout=SECONDS)
    assert losses[0] == waiting[0][0][0]
    here, there = (
        LlamaForCausalLM.from_pretrained(folder / "straight" / "checkpoint-12").state_dict()
        for folder in (tmp_path, waits)
    )
    assert largest_difference(here, there) == 0.0


@pytest.mark.distributed
@pytest.mark.ci
def test_the_best_model_of_two_ranks_under_fsdp2(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "given": lambda: []}
    found = [
        run_on_ranks(on_a_rank, tmp_path / kind.__name__, "fsdp2", (), kind, backend="fsdp2", timeout=SECONDS, **args)
        for kind in (AccelTrainer, Asynchronous)
    ]
    assert largest_difference(*(weights[0] for (_, weights, _), _ in found)) == 0.0


@pytest.mark.distributed
@pytest.mark.ci
def test_ranks_with_optimizers_of_their_own(tmp_path):
    (losses, weights, _), _ = run_on_ranks(
        on_a_rank, tmp_path, "ddp", (4, 8), timeout=SECONDS, given=lambda: [DiLoCo(every=4)]
    )
    assert losses[0] == losses[1] == losses[2]
    assert largest_difference(weights[0], weights[1]) == 0.0 == largest_difference(weights[0], weights[2])


def alone(directory):
    trainer = make(directory)
    trainer.train()
    faults = [ckpt.integrity_error(path) for path in ckpt.checkpoints(directory)]
    return [dist.get_backend(group) for group in trainer.accel.writer.groups if group is not None], faults


@pytest.mark.distributed
@pytest.mark.ci
def test_one_rank_of_one_has_groups_that_need_no_accelerator(tmp_path):
    ((backends, faults),) = run_on_ranks(alone, tmp_path, world=1, timeout=SECONDS)
    assert backends == ["gloo"] * 3 and faults == [None] * 4


def one_rank_cannot_write(directory):
    """What rank 1 cannot write, all ranks hear of."""
    trainer = make(directory, given=lambda: [DiLoCo(every=3)], per_device_train_batch_size=4, use_cpu=True)
    if trainer.args.process_index == 1:
        trainer.add_callback(FillsTheDisk(trainer))
    with pytest.raises(ckpt.CheckpointError) as raised:
        trainer.train()
    return trainer.state.global_step, str(raised.value)


@pytest.mark.distributed
@pytest.mark.ci
def test_one_rank_cannot_write(tmp_path):
    for step, words in run_on_ranks(one_rank_cannot_write, tmp_path, timeout=SECONDS):
        assert step == 9 and "checkpoint-6: the checkpoint could not be written" in words
    assert ckpt.newest_complete(tmp_path)[0] == tmp_path / "checkpoint-3"


def refused(directory):
    from ranks import backend_args

    with pytest.raises(ValueError, match="async_checkpoints=True does not support DeepSpeed, whose engine writes"):
        make(directory, per_device_train_batch_size=4, given=lambda: [], **backend_args("zero1"))
    return True


@pytest.mark.distributed
@pytest.mark.ci
def test_deepspeed_is_refused(tmp_path):
    assert run_on_ranks(refused, tmp_path, backend="zero1") == [True, True]


def test_frozen_layers_are_written_as_they_were(tmp_path):
    here, there = (
        trained(tmp_path / kind.__name__, kind, lambda: [LayerFreezing()]) for kind in (Asynchronous, AccelTrainer)
    )
    assert losses_of(here) == losses_of(there)


def test_nothing_of_an_earlier_run_is_left_in_a_checkpoint(tmp_path):
    settings = {"kind": AccelTrainer, "save_steps": 6}
    trained(tmp_path, given=lambda: [ExponentialMovingAverage(), PaddingFree()], **settings)
    assert (tmp_path / "checkpoint-6" / ckpt.AVERAGED).exists()
    assert (tmp_path / "checkpoint-6" / "accel_rank0.json").exists()
    trained(tmp_path, given=lambda: [StochasticWeightAveraging(start=0.75)], **settings)
    assert not list((tmp_path / "checkpoint-6").glob("accel_rank*"))
    assert not (tmp_path / "checkpoint-6" / ckpt.AVERAGED).exists()
    assert (tmp_path / "checkpoint-12" / ckpt.AVERAGED).exists()
    assert ckpt.integrity_error(tmp_path / "checkpoint-6") is None
