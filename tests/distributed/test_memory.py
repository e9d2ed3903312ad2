"""Memory on two ranks: the size is agreed on before the first step; a later shortage ends all with one sentence."""

import datetime
import time

import pytest
import torch
from ranks import assert_backend, backend_args, run_on_ranks

from hf_accel import InfoBatch
from hf_accel.engine import memory
from hf_accel.testing import losses_of, tiny_trainer
from hf_accel.weights import local_parameters

pytestmark = [pytest.mark.distributed, pytest.mark.ci]


def train(directory, backend, size, rows=None, place="forward", from_step=0, resume=None, **args):
    """Micro-batch size, steps, losses and local weights; memory suffices for ``rows[rank]`` rows."""
    args = backend_args(backend) | {"num_train_epochs": 2, "per_device_train_batch_size": 8} | args
    trainer = tiny_trainer([InfoBatch()], directory, micro_batch_size=size, **args)
    if rows is not None:
        limit = rows[trainer.args.process_index]

        def fail(module, *_):
            if module.training and trainer.state.global_step >= from_step and trainer.rows > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        def enter(module, positional, inputs):
            trainer.rows = len(inputs["input_ids"])

        trainer.model.register_forward_pre_hook(enter, with_kwargs=True)
        layer = trainer.model.model.layers[2]
        layer.register_forward_pre_hook(fail) if place == "forward" else layer.register_full_backward_hook(fail)
    trainer.train(resume_from_checkpoint=resume)
    assert_backend(trainer, backend)
    weights = {name: value.clone() for name, value in local_parameters(trainer.model, trainable_only=False).items()}
    return trainer.micro_batch_size, trainer.state.global_step, losses_of(trainer), weights, trainer.receipt.samples


def assert_same(found, expected):
    assert found[:3] == expected[:3] and found[4] == expected[4]
    assert all(torch.equal(found[3][name], expected[3][name]) for name in expected[3])


@pytest.mark.parametrize(
    "backend, rows, place, size",
    [
        ("ddp", (8, 5), "forward", 4),
        ("ddp", (2, 7), "backward", 2),
        ("ddp", (8, 8), "forward", 8),
        ("fsdp2", (5, 5), "forward", 4),
        ("fsdp2", (2, 2), "backward", 2),
    ],
)
def test_the_smallest_of_all_ranks_is_agreed_on(backend, rows, place, size, tmp_path):
    def both():
        return (
            train(tmp_path / "auto", backend, "auto", rows, place),
            train(tmp_path / "given", backend, size),
        )

    for auto, given in run_on_ranks(both, backend=backend):
        assert auto[0] == size
        assert_same(auto, given)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_no_example_fits(backend, tmp_path):
    with pytest.raises(pytest.fail.Exception) as caught:
        run_on_ranks(train, tmp_path, backend, "auto", (0, 0), backend=backend)
    assert "NotEnoughMemory: One example does not fit into memory. Shorten the" in str(caught.value)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_later_shortage_ends_all_ranks(backend, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 4}
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as caught:
        run_on_ranks(train, tmp_path, backend, "auto", (8, 5), from_step=6, backend=backend, timeout=90, **args)
    assert time.monotonic() - began < 60
    sentence = (
        "NotEnoughMemory: Micro-batches of 8 examples do not fit into memory at step 7. "
        f"Resume from {tmp_path}/checkpoint-4 with micro_batch_size=4."
    )
    assert sentence in str(caught.value)
    checkpoint = str(tmp_path / "checkpoint-4")
    for size, steps, *_ in run_on_ranks(train, tmp_path, backend, 4, (8, 5), resume=checkpoint, backend=backend):
        assert (size, steps) == (4, 8)


def test_sharded_ranks_that_run_out_apart(tmp_path, monkeypatch):
    """They go in step, so that a rank alone cannot go on: all end, and the sentence names a smaller size."""
    monkeypatch.setattr(memory, "PATIENCE", datetime.timedelta(seconds=2))
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as caught:
        run_on_ranks(train, tmp_path, "fsdp2", "auto", (8, 5), backend="fsdp2")
    assert time.monotonic() - began < 30
    sentence = "Micro-batches of 8 examples fit into memory on some ranks only. Start again with micro_batch_size=4."
    assert f"NotEnoughMemory: {sentence}" in str(caught.value)
