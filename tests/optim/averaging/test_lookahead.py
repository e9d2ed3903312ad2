"""`Lookahead`: against a loop written by hand, and where the contract does not look."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState

from hf_accel import ExponentialMovingAverage, Lookahead
from hf_accel.testing import losses_of, tiny_llama, tiny_trainer, weights_of

SAVING = {"save_strategy": "steps", "save_steps": 4}


class Host:
    """Stands for AccelTrainer, which alone can ask for averages."""

    clock, is_deepspeed_enabled = None, False


def gradient(weight, step):
    """Of a quadratic with its own noise in each step, by hand."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 4, generator=generator, dtype=weight.dtype)
    return 2 * (weight @ inputs.T) @ inputs / 8


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8), (1, 0.25), (7, 1.0)])
def test_fast_and_slow_weights_are_those_of_a_loop_by_hand(k, alpha):
    technique, state = Lookahead(k, alpha), TrainerState()
    technique.run_ = Host()
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(12.0).view(3, 4) / 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    technique.on_train_begin(None, state, None, model=model)

    fast = slow = model.weight.detach().clone()
    momentum = torch.zeros_like(fast)
    for step in range(1, 24):
        model.weight.grad = gradient(model.weight.detach(), step)
        optimizer.step()
        state.global_step = step
        technique.on_step_end(None, state, None)

        momentum = 0.9 * momentum + gradient(fast, step)
        fast = fast - 0.05 * momentum
        if step % k == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow
        torch.testing.assert_close(model.weight.detach(), fast, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(technique.averages_["weight"], slow, rtol=1e-12, atol=1e-14)
        met = slow + alpha * (fast - slow)
        torch.testing.assert_close(technique.averaging()["weight"], met, rtol=1e-12, atol=1e-14)
    assert technique.report() == {"meetings": 23 // k}


def test_slow_weights_of_half_precision_move_by_less_than_its_resolution():
    technique, state, model = Lookahead(1, 0.01), TrainerState(), nn.Linear(1, 1, bias=False).bfloat16()
    technique.run_ = Host()
    nn.init.ones_(model.weight)
    technique.on_train_begin(None, state, None, model=model)
    for _ in range(100):  # each time by 0.01 of a hundredth; bfloat16 knows nothing between 1 and 1.0078
        with torch.no_grad():
            model.weight.fill_(1.0078125)
        technique.on_step_end(None, state, None)
    assert technique.averages_["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.99**100), rel=1e-4)


def test_slow_weights_are_returned_and_checkpoints_hold_both(tmp_path):
    trainer = tiny_trainer([Lookahead(5)], tmp_path, **SAVING)
    trainer.train()
    slow = load_file(tmp_path / "checkpoint-24" / "averaged.safetensors")
    for name, returned in trainer.model.named_parameters():
        assert torch.equal(returned.detach(), slow[name])
    assert trainer.receipt.techniques[0]["report"] == {"meetings": 4}
    plain = tiny_trainer([], tmp_path / "plain")
    plain.train()
    assert losses_of(trainer)[:5] == losses_of(plain)[:5]
    assert losses_of(trainer)[5] != losses_of(plain)[5]
    at_meeting, later = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (20, 24))
    for name, returned in slow.items():
        torch.testing.assert_close(returned, (at_meeting[name] + later[name]) / 2)
    assert not torch.equal(slow["lm_head.weight"], later["lm_head.weight"])


def test_a_run_of_fewer_steps_than_k_is_not_lost(tmp_path):
    args = {"max_steps": 3, "dropout": 0.0}
    plain = tiny_trainer([], tmp_path / "plain", **args)
    before = weights_of(plain)
    plain.train()
    trainer = tiny_trainer([Lookahead(5, 0.8)], tmp_path, **args, eval_strategy="steps", eval_steps=1)
    trainer.train()
    after = weights_of(plain)
    for name, returned in weights_of(trainer).items():
        torch.testing.assert_close(returned, before[name] + 0.8 * (after[name] - before[name]))
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == evaluated[-1]


def test_one_averaging_technique_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="both own the slot 'averaging'. Keep one."):
        tiny_trainer([Lookahead(), ExponentialMovingAverage()], tmp_path, model=tiny_llama())
