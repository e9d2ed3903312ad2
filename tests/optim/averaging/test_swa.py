"""`StochasticWeightAveraging`: against the mean of recorded weights of a run."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from transformers import TrainerCallback

from hf_accel import StochasticWeightAveraging
from hf_accel.testing import losses_of, tiny_llama, tiny_trainer

STEPS = 24


class Recording(TrainerCallback):
    """Copies the weights after every step."""

    def __init__(self):
        self.iterates = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.iterates[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def train(technique, directory, dtype=torch.float64, **args):
    recording = Recording()
    trainer = tiny_trainer([technique], directory, dtype=dtype, **args)
    trainer.add_callback(recording)
    trainer.train()
    assert list(recording.iterates) == list(range(1, STEPS + 1))
    return trainer, recording.iterates


def averaged_steps(start, every):
    """The first step at or after each multiple of ``every`` that is not before ``start``, exactly."""
    start, every = Fraction(start), Fraction(every)
    found, n = [], 0
    while n * every <= 1:
        step = -(-n * every * STEPS // 1)
        if step and step / Fraction(STEPS) >= start and step not in found:
            found.append(int(step))
        n += 1
    return found


@pytest.mark.parametrize(
    ("start", "every", "steps"),
    [
        ("3/4", "1/100", range(18, 25)),
        ("1/2", "1/4", [12, 18, 24]),
        ("0", "1/10", [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]),
        ("1", "1/100", [24]),
    ],
)
def test_the_returned_weights_are_the_mean_of_those_at_each_share_from_the_start_on(start, every, steps, tmp_path):
    assert averaged_steps(start, every) == list(steps)
    technique = StochasticWeightAveraging(start=float(Fraction(start)), every=float(Fraction(every)))
    trainer, iterates = train(technique, tmp_path)
    for name, returned in trainer.model.named_parameters():
        expected = torch.stack([iterates[step][name] for step in steps]).mean(0)
        torch.testing.assert_close(returned.detach(), expected, rtol=1e-12, atol=1e-14)
    assert trainer.receipt.techniques[0]["report"] == {"averaged": len(steps)}


def test_training_is_the_same_and_there_are_no_averages_before_the_start(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    plain = tiny_trainer([], tmp_path / "plain", **every)
    plain.train()
    trainer, _ = train(StochasticWeightAveraging(start=0.5), tmp_path / "swa", torch.float32, **every)
    assert losses_of(trainer) == losses_of(plain)
    rates = [[entry.get("learning_rate") for entry in t.state.log_history] for t in (plain, trainer)]
    assert rates[0] == rates[1]
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (plain, trainer)]
    assert evaluated[0][0] == evaluated[1][0] and evaluated[0][1] != evaluated[1][1]
    present = [(tmp_path / "swa" / f"checkpoint-{step}" / "averaged.safetensors").exists() for step in (8, 16, 24)]
    assert present == [False, True, True]


def test_half_precision_is_averaged_in_float32(tmp_path):
    technique = StochasticWeightAveraging(start=0.0)
    trainer, iterates = train(technique, tmp_path, torch.bfloat16, model=tiny_llama(dtype=torch.bfloat16))
    for name, returned in trainer.model.named_parameters():
        assert returned.dtype == torch.bfloat16 and technique.averages_[name].dtype == torch.float32
        expected = torch.stack([iterates[step][name].double() for step in iterates]).mean(0)
        torch.testing.assert_close(technique.averages_[name].double(), expected, rtol=1e-5, atol=1e-6)
