"""`hf_accel.optim.averaging.ema`: against the weighted mean of recorded weights, which shares no code with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from hf_accel.optim import ExponentialMovingAverage
from hf_accel.optim.averaging.ema import ema_update
from hf_accel.testing import tiny_trainer
from hf_accel.weights import local_parameters, swap

HALF_LIFE, STEPS = 3.0, 40


class Host:
    """Stands for AccelTrainer, which alone can ask for averages."""

    def __init__(self, state):
        self.state = state

    @property
    def clock(self):
        return SimpleNamespace(progress=self.state.global_step / STEPS)


class Run:
    """A training loop that sends a technique the events of Trainer."""

    def __init__(self, technique, dtype=torch.float64, resume=None):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3).to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.state, self.technique = TrainerState(max_steps=STEPS), technique
        technique.run_ = Host(self.state)
        if resume is not None:
            self.model.load_state_dict(resume["model"])
            self.optimizer.load_state_dict(resume["optimizer"])
            self.state.global_step = resume["step"]
        technique.on_train_begin(None, self.state, None, model=self.model)
        if resume is not None:
            technique.load_state_dict("global", resume["technique"])
        self.iterates = [self.weights()]

    def weights(self):
        return {name: weight.clone() for name, weight in local_parameters(self.model).items()}

    def steps(self, n):
        for _ in range(n):
            generator = torch.Generator().manual_seed(self.state.global_step)
            inputs = torch.randn(8, 4, generator=generator, dtype=self.model.weight.dtype)
            self.optimizer.zero_grad()
            self.model(inputs).square().sum().backward()
            self.optimizer.step()
            self.state.global_step += 1
            self.technique.on_step_end(None, self.state, None)
            self.iterates.append(self.weights())
        return self

    def checkpoint(self):
        return {
            "model": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.state.global_step,
            "technique": self.technique.state_dict("global"),
        }


def weighted_mean(tensors, half_life):
    """Each half life back halves the weight; the first iterate also stands for all that would lie before it."""
    r = 0.5 ** (1 / half_life)
    last = len(tensors) - 1
    weights = [(1 - r) * r ** (last - i) for i in range(1, last + 1)]
    return r**last * tensors[0].double() + sum(w * t.double() for w, t in zip(weights, tensors[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_average_is_the_weighted_mean_of_all_iterates(dtype):
    run = Run(ExponentialMovingAverage(HALF_LIFE), dtype).steps(20)
    kept = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}[dtype]
    for name, average in run.technique.averages_.items():
        assert average.dtype == kept
        expected = weighted_mean([iterate[name] for iterate in run.iterates], HALF_LIFE)
        rtol = {torch.float64: 1e-12, torch.float32: 1e-5}[kept]
        torch.testing.assert_close(average.double(), expected, rtol=rtol, atol=rtol)
    assert all(average.dtype == dtype for average in run.technique.averaging().values())


def test_half_a_life_after_a_jump_half_the_way_is_made():
    averages, weights = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    for _ in range(7):
        ema_update(averages, weights, 2 ** (-1 / 7))
    torch.testing.assert_close(averages["w"], torch.full((2,), 0.5))


def test_a_share_of_the_budget_is_counted_in_progress_and_warmed_up():
    run = Run(ExponentialMovingAverage(0.1)).steps(20)
    expected = run.iterates[0]["weight"]
    for n, iterate in enumerate(run.iterates[1:]):  # a step is a quarter of a half life
        decay = min(2**-0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * iterate["weight"]
    torch.testing.assert_close(run.technique.averages_["weight"], expected, rtol=1e-12, atol=1e-14)


def test_progress_need_not_be_even():
    technique, model = ExponentialMovingAverage(0.05), nn.Linear(1, 1, bias=False).double()
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=0.0), model=model)
    technique.on_train_begin(None, TrainerState(), None, model=model)
    expected = model.weight.detach().clone()
    for n, progress in enumerate([0.01, 0.2, 0.21, 0.5, 1.0]):
        before, technique.run_.clock.progress = technique.run_.clock.progress, progress
        nn.init.constant_(model.weight, n)
        technique.on_step_end(None, TrainerState(), None)
        decay = min(0.5 ** ((progress - before) / 0.05), (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    torch.testing.assert_close(technique.averages_["weight"], expected, rtol=1e-12, atol=1e-14)


def test_short_runs_are_not_spoilt_by_the_default(tmp_path):
    """A hundred steps at a constant rate; a half life of 100 steps ended at more than twice the loss."""
    args = {"max_steps": 100, "lr_scheduler_type": "constant", "dropout": 0.0}
    losses = []
    for techniques in ([], [ExponentialMovingAverage()]):
        trainer = tiny_trainer(techniques, tmp_path, **args)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] < 1.05 * losses[0]


def test_training_is_the_same_to_the_bit():
    with_average = Run(ExponentialMovingAverage(HALF_LIFE)).steps(10).weights()
    without = Run(ExponentialMovingAverage(1e9)).steps(10).weights()
    assert all(torch.equal(with_average[name], without[name]) for name in without)


def test_neutral_half_life_gives_the_weights_themselves():
    run = Run(ExponentialMovingAverage(**ExponentialMovingAverage.neutral), torch.float32).steps(10)
    assert all(torch.equal(average, run.weights()[name]) for name, average in run.technique.averaging().items())


def test_resume_is_exact_and_reports_all_updates():
    whole = Run(ExponentialMovingAverage(HALF_LIFE)).steps(10)
    half = Run(ExponentialMovingAverage(HALF_LIFE)).steps(4).checkpoint()
    resumed = Run(ExponentialMovingAverage(HALF_LIFE), resume=half).steps(6)
    expected = whole.technique.averaging()
    assert all(torch.equal(average, expected[name]) for name, average in resumed.technique.averaging().items())
    assert resumed.technique.report() == whole.technique.report() == {"half_life": HALF_LIFE, "updates": 10}


def test_same_instance_trains_twice():
    technique = ExponentialMovingAverage(HALF_LIFE)
    first = Run(technique).steps(5).technique.averaging()
    second = Run(technique).steps(5).technique.averaging()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert technique.report()["updates"] == 5
    assert technique.took_effect(technique.report())


def test_parameters_frozen_at_the_start_are_left_out_and_those_frozen_later_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    technique = ExponentialMovingAverage(HALF_LIFE)
    technique.run_ = Host(TrainerState())
    technique.on_train_begin(None, TrainerState(), None, model=model)
    model[1].requires_grad_(False)
    technique.on_step_end(None, TrainerState(), None)
    assert list(technique.averaging()) == ["1.weight", "1.bias"]


def test_swapped_averages_come_back_whatever_the_dtype_of_the_weights():
    for dtype in torch.float32, torch.bfloat16:
        run = Run(ExponentialMovingAverage(HALF_LIFE), dtype).steps(5)
        averages = {name: average.clone() for name, average in run.technique.averages_.items()}
        weights, given = run.weights(), run.technique.averaging()
        swap(run.model, given)
        assert not torch.equal(run.model.weight, weights["weight"])
        swap(run.model, given)
        assert all(torch.equal(weight, weights[name]) for name, weight in run.weights().items())
        assert all(torch.equal(run.technique.averages_[name], average) for name, average in averages.items())


def test_there_are_no_averages_before_training():
    assert ExponentialMovingAverage().averaging() is None


@pytest.mark.parametrize("half_life", [0, -1.0, float("nan"), "100"])
def test_bad_half_life_names_itself(half_life):
    with pytest.raises((ValueError, TypeError), match="half_life"):
        ExponentialMovingAverage(half_life)


def test_plain_trainer_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="AccelTrainer"):
        Trainer(nn.Linear(2, 2), arguments, callbacks=[ExponentialMovingAverage()])
