"""A run that goes on with another number of ranks: the same plan, the same books, the same trajectory."""

from __future__ import annotations

import pytest
import torch
from ranks import backend_args, run_on_ranks

from hf_accel import Budget, ExponentialMovingAverage, GradientCompression, InfoBatch
from hf_accel.testing import losses_of, tiny_trainer
from hf_accel.weights import gather, local_parameters

pytestmark = [pytest.mark.distributed, pytest.mark.ci]

EXAMPLES = 8
EXACT = {"dropout": 0.0, "dtype": torch.float64}


def train(directory, ranks, backend=None, resume=None, **settings):
    """A run, and what it trained on: the ids of each step."""
    args = {"use_cpu": True} if backend is None or ranks == 1 else backend_args(backend)
    techniques = [Budget("3epochs"), InfoBatch(keep=0.5), ExponentialMovingAverage(half_life=4)]
    trainer = tiny_trainer(
        techniques, directory, per_device_train_batch_size=EXAMPLES // ranks, **EXACT, **settings, **args
    )
    plan, read = [], trainer.accel.step.transformed

    def spy(batch):
        plan.append(batch.plan.ids_N.tolist())
        return read(batch)

    trainer.accel.step.transformed = spy
    trainer.train(resume_from_checkpoint=resume)
    weights = gather(trainer.model, local_parameters(trainer.model, trainable_only=False))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    spent = {unit: amount for unit, amount in trainer.clock.spent.items() if unit != "seconds"}
    return plan, rates, spent, losses_of(trainer), weights


def on(ranks, *args, backend="ddp", **kwargs):
    if ranks == 1:
        return train(*args, 1, None, **kwargs)
    return run_on_ranks(train, *args, ranks, backend, world=ranks, backend=backend, timeout=240, **kwargs)[0]


@pytest.mark.parametrize(
    ("backend", "before", "after"),
    [("ddp", 1, 2), ("ddp", 2, 1), ("ddp", 2, 4), ("ddp", 4, 2), ("fsdp2", 2, 4), ("fsdp2", 4, 2)],
)
def test_another_number_of_ranks_goes_on(backend, before, after, tmp_path):
    straight = on(1, tmp_path / "straight")
    on(before, tmp_path / "first", backend=backend, save_strategy="steps", save_steps=5)
    resumed = on(after, tmp_path / "resumed", backend=backend, resume=str(tmp_path / "first" / "checkpoint-10"))
    plan, rates, spent, losses, weights = straight
    assert resumed[0] == plan[10:]
    assert resumed[1] == pytest.approx(rates, rel=1e-12)
    assert resumed[2] == spent
    assert resumed[3] == pytest.approx(losses, rel=1e-6)
    assert max(float((weights[name] - resumed[4][name]).abs().max()) for name in weights) < 1e-7


def test_under_zero_it_is_refused_before_the_first_step(tmp_path):
    def save():
        args = backend_args("zero2") | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        tiny_trainer([InfoBatch()], tmp_path, per_device_train_batch_size=4, **args).train()

    def resume():
        trainer = tiny_trainer([InfoBatch()], tmp_path, per_device_train_batch_size=2, **backend_args("zero2"))
        with pytest.raises(ValueError, match="DeepSpeed wrote it on 2 ranks.*Resume on 2, or convert"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return trainer.state.global_step

    run_on_ranks(save, backend="zero2")
    assert run_on_ranks(resume, world=4, backend="zero2") == [0] * 4


def test_what_was_kept_for_each_rank_is_left_behind_with_a_word(tmp_path, caplog):
    def run(ranks, resume=None, **args):
        technique = GradientCompression("powersgd", rank=1, start=0.0)
        trainer = tiny_trainer(
            [technique], tmp_path, per_device_train_batch_size=EXAMPLES // ranks, max_steps=6, **args
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    run_on_ranks(run, 2, save_strategy="steps", save_steps=3)
    assert run(1, resume=str(tmp_path / "checkpoint-3")) == 6
    assert "what techniques kept for each of them is left behind" in caplog.text
