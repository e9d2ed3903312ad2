"""What all shapes have in common, and what cannot be one with them."""

from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_accel import Budget
from hf_accel.optim.learning_rate import REX, Cosine, LayerwiseDecay, LinearToZero, OneCycle, WarmupStableDecay
from hf_accel.testing import tiny_trainer

SHAPES = [Cosine, LinearToZero, OneCycle, REX, WarmupStableDecay]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_shapes_rise_to_the_peak_at_the_end_of_the_warm_up_and_fall(shape, warmup):
    schedule = shape(warmup=warmup).schedule
    grid = [schedule(i / 1000) for i in range(1001)]
    peak = int(warmup * 1000)
    assert grid[peak] == pytest.approx(1.0)
    assert all(0 <= factor <= 1 + 1e-12 for factor in grid)
    assert all(a < b for a, b in pairwise(grid[: peak + 1]))
    assert all(a >= b for a, b in pairwise(grid[peak:])) and grid[-1] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("first", "second"), [(Cosine, REX), (OneCycle, Cosine)])
def test_two_shapes_are_refused(first, second, tmp_path):
    with pytest.raises(ValueError, match=rf"{first.__name__}\(.* and {second.__name__}\(.* both own the slot 'sche"):
        tiny_trainer([first(), second()], tmp_path)


@pytest.mark.parametrize("shape", [Cosine, OneCycle])
@pytest.mark.parametrize(
    "args",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant"},
        {"warmup_steps": 10},
        {"warmup_steps": 0.1},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
    ],
    ids=str,
)
def test_a_schedule_in_the_arguments_is_refused(shape, args, tmp_path):
    ((name, value),) = args.items()
    with pytest.raises(ValueError, match=rf"{name}=.*{value}.*: {shape.__name__}\(.* is the schedule") as caught:
        tiny_trainer([shape()], tmp_path, **args)
    assert str(caught.value).endswith("including its warm-up. Remove one.")


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_metric_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{kind}': it follows the metric"):
        tiny_trainer([REX()], tmp_path, lr_scheduler_type=kind, eval_strategy="steps")


def given(technique, directory, with_schedule):
    trainer = tiny_trainer([technique], directory)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    if with_schedule:
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 1.0)
    return trainer


def test_a_schedule_that_was_given_to_the_trainer_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"REX\(.*\) does not support a ready-made lr_scheduler \(LambdaLR\) because a run has one schedule",
    ):
        given(REX(), tmp_path, with_schedule=True).train()


def test_an_optimizer_that_was_given_to_the_trainer_keeps_its_own_groups(tmp_path):
    given(REX(), tmp_path, with_schedule=False).train()
    why = "because its parameter groups are fixed"
    with pytest.raises(
        ValueError, match=rf"LayerwiseDecay\(.*\) does not support a ready-made optimizer \(SGD\) {why}"
    ):
        given(LayerwiseDecay(), tmp_path, with_schedule=False).train()


def test_one_trainer_trains_twice_with_an_optimizer_of_its_own(tmp_path):
    trainer = tiny_trainer([LayerwiseDecay(), REX()], tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.train()
    assert trainer.receipt.final_learning_rate == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_end_with_a_budget_of_any_unit(shape, tmp_path):
    technique = shape()
    trainer = tiny_trainer([technique, Budget("44samples")], tmp_path)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([5e-3 * technique.schedule(8 * k / 44) for k in range(6)])
    assert trainer.receipt.final_learning_rate == pytest.approx(0.0, abs=1e-7)
