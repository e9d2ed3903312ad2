"""GradientSpikeGuard against a hand-written rule, and in runs with planted NaN."""

import math
import random

import pytest
import torch
from transformers import Trainer

from hf_accel import GradientSpikeGuard
from hf_accel.optim.optimizers.gradient_spike_guard import is_spike
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of


def test_spikes_are_those_above_the_geometric_mean():
    choose = random.Random(0)
    guard = GradientSpikeGuard(max_ratio=3.0, patience=100)
    guard.mean_log_norm_, guard.seen_, guard.refused_, guard.in_a_row_ = 0.0, 0, 0, 0
    accepted = []
    for _ in range(50):
        norm = math.exp(choose.gauss(0, 1))
        mean = math.exp(sum(map(math.log, accepted)) / len(accepted)) if accepted else None
        expected = len(accepted) < 5 or norm <= 3.0 * mean
        assert guard.accept_step(norm) == expected
        if expected:
            accepted.append(norm)
    assert 0 < guard.refused_ < 25


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(norm):
    assert is_spike(norm, 0.0, 0, math.inf)


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def poisoned(directory, steps, technique, **args):
    """A run whose gradient is NaN at the given steps."""
    trainer = tiny_trainer([technique], directory, dropout=0.0, **args)

    def hook(module, inputs, output):
        return Poison.apply(output) if trainer.state.global_step in steps and module.training else output

    trainer.model.model.embed_tokens.register_forward_hook(hook)
    trainer.train()
    return trainer


def test_a_nan_leaves_weights_and_moments_alone(tmp_path):
    trainer = poisoned(tmp_path, {4, 9}, GradientSpikeGuard())
    assert all(torch.isfinite(w).all() for w in weights_of(trainer).values())
    assert (trainer.receipt.skipped_steps, trainer.receipt.steps) == (2, 22)
    assert trainer.receipt.techniques[0]["report"] == {"accepted": 22, "refused": 2}
    states = trainer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {22}


def test_it_resumes_with_what_it_has_seen(tmp_path):
    straight = poisoned(tmp_path / "a", {4, 9}, GradientSpikeGuard(), save_strategy="steps", save_steps=6)
    resumed = tiny_trainer([GradientSpikeGuard()], tmp_path / "b", dropout=0.0)
    resumed.model.model.embed_tokens.register_forward_hook(
        lambda m, i, o: Poison.apply(o) if resumed.state.global_step in {4, 9} and m.training else o
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    assert resumed.receipt.techniques[0]["report"] == straight.receipt.techniques[0]["report"]


def test_many_in_a_row_end_the_run_with_a_sentence(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"GradientSpikeGuard\(max_ratio=10.0, patience=3\): 3 updates in a row were refused"
    ):
        poisoned(tmp_path, set(range(5, 20)), GradientSpikeGuard(patience=3))


def test_a_plain_trainer_is_refused(tmp_path):
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer)
    trainer.add_callback(GradientSpikeGuard())
    with pytest.raises((TypeError, ValueError), match="GradientSpikeGuard.*needs accept_step"):
        trainer.train()
