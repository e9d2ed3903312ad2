"""Seesaw against closed forms: halvings, the invariant of normalized SGD, and the number of steps."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_accel import Seesaw
from hf_accel.optim.large_batch.seesaw import decay, seesaw
from hf_accel.testing import tiny_trainer


@pytest.mark.parametrize("k", range(6))
def test_each_halving_becomes_a_root_and_a_doubling(k):
    rate, doublings = seesaw(2.0**-k, 10)
    assert doublings == k and rate == pytest.approx(math.sqrt(0.5) ** k, rel=1e-15)
    just_before, fewer = seesaw(2.0**-k * 1.0001, 10)
    assert k == 0 or (fewer == k - 1 and just_before == pytest.approx(rate * math.sqrt(2)))


@pytest.mark.parametrize("max_doublings", [0, 1, 3])
def test_from_the_largest_batch_on_the_schedule_decays_as_before(max_doublings):
    largest = 2.0**-max_doublings
    for share in (1.0, 0.7, 0.1, 1e-9, 0.0):
        rate, doublings = seesaw(share * largest, max_doublings)
        assert doublings == max_doublings
        assert rate == pytest.approx(share * math.sqrt(largest), rel=1e-12, abs=0)


def test_schedules_fall_from_one_to_zero_after_the_warm_up():
    for i in range(101):
        p = Fraction(1, 5) + Fraction(4, 5) * Fraction(i, 100)
        assert decay(float(p), warmup=0.2, shape="linear") == pytest.approx(1 - i / 100, abs=1e-12)
        assert decay(float(p), warmup=0.2, shape="cosine") == pytest.approx(math.cos(math.pi * i / 200) ** 2, abs=1e-12)
    assert decay(0.1, warmup=0.2, shape="cosine") == 1.0


@pytest.mark.parametrize(("factor", "doublings"), [(1, 0), (2, 1), (7, 2), (8, 3)])
def test_a_linear_decay_leaves_the_steps_of_the_closed_form(factor, doublings):
    technique = Seesaw(factor=factor, warmup=0.0, shape="linear")
    examples, batch = 80_000, 8
    spent, steps = 0, 0
    while spent < examples:
        technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=spent / examples))
        size = technique.batch(torch.empty(0), batch)
        spent, steps = spent + size, steps + 1
        assert batch <= size <= batch * factor
    # Stage k trains on 2^-(k + 1) of the examples in steps of 2^k, and the last on the rest.
    share = sum(2.0 ** -(2 * k + 1) for k in range(doublings)) + 4.0**-doublings
    assert steps == pytest.approx(share * examples / batch, rel=2e-3)


def test_a_run_warms_up_and_then_trades(tmp_path):
    technique = Seesaw(factor=4, warmup=0.125, shape="linear")
    trainer = tiny_trainer([technique], tmp_path, num_train_epochs=4)
    sizes, progress = [], []
    draw = technique.transform_batch

    def record(batch):
        sizes.append(batch.num_examples)
        progress.append(trainer.clock.progress)
        return draw(batch)

    technique.transform_batch = record
    trainer.train()
    rates = [entry["learning_rate"] / 5e-3 for entry in trainer.state.log_history if "loss" in entry]
    left = [1 - max(p - 0.125, 0) / 0.875 for p in progress]
    for size, rate, p, s in zip(sizes, rates, progress, left, strict=True):
        if p < 0.125:
            assert (size, rate) == (8, pytest.approx(8 * p))
        elif s > 0.5:
            assert (size, rate) == (8, 1.0)
        elif s > 0.25:
            assert (size, rate) == (16, pytest.approx(math.sqrt(0.5)))
        else:
            assert size == 32 or p == max(progress)
            assert rate == pytest.approx(0.5 * s / 0.25)
    assert set(sizes) == {8, 16, 32} and sum(sizes) == 256
    report = trainer.receipt.techniques[0]["report"]
    assert report == {"mean_batch": 256 / len(sizes), "largest_batch": 32}
    assert trainer.receipt.final_learning_rate == 0.0
