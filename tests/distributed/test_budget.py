"""Budgets on two ranks: what is spent is that of both, and both stop at the same step."""

from __future__ import annotations

import time

import pytest
import torch
from ranks import run_on_ranks

from hf_accel import Budget
from hf_accel.testing import collate_padded, tiny_trainer

pytestmark = [pytest.mark.distributed, pytest.mark.ci]


def of_one_length(features):
    batch = collate_padded(features)
    return {k: torch.nn.functional.pad(v, (0, 24 - v.shape[1]), value=-100 * (k == "labels")) for k, v in batch.items()}


def train(directory, limit, size, slow=None):
    trainer = tiny_trainer([Budget(limit)], directory, per_device_train_batch_size=size)
    trainer.data_collator = of_one_length
    if slow is not None and trainer.args.process_index == slow:
        step = trainer.training_step

        def slowly(*args, **kwargs):
            time.sleep(0.02)
            return step(*args, **kwargs)

        trainer.training_step = slowly
    trainer.train()
    return trainer.state.global_step, dict(trainer.clock.spent), trainer.receipt.final_learning_rate


def test_what_both_compute_is_spent(tmp_path):
    alone = train(tmp_path / "alone", "1e9flop", 8)
    for steps, spent, rate in run_on_ranks(train, tmp_path / "two", "1e9flop", 4):
        assert (steps, rate) == (alone[0], 0.0) and 0.95e9 < spent["flops"] <= 1e9
        assert spent["flops"] == alone[1]["flops"]


@pytest.mark.parametrize("slow", [0, 1])
def test_time_is_that_of_the_first_rank(slow, tmp_path):
    (steps, spent, rate), (other, _, other_rate) = run_on_ranks(train, tmp_path, "3s", 4, slow)
    assert steps == other > 3 and rate == other_rate == 0.0
    assert 0.9 * 3 < spent["seconds"] <= 1.1 * 3  # on a busy machine the last step may take longer than foreseen


def test_too_little_on_every_rank(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="is too small for one step"):
        run_on_ranks(train, tmp_path, "1e5flop", 4)
