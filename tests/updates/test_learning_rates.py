from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_accel import AccelTrainer, Budget, GradientSpikeGuard, InfoBatch, LinearToZero, Muon, Technique, find_lr
from hf_accel.engine.short_run import probe_of, short_run
from hf_accel.testing import tiny_llama, tiny_trainer, weights_of
from hf_accel.updates import learning_rates as module
from hf_accel.updates.learning_rates import bracket, divergence, halve, index_of, rate_at, smoothed

pytestmark = pytest.mark.ci


def test_the_lattice_is_of_factors_of_sqrt_2():
    for index in range(-30, 30):
        assert index_of(rate_at(index)) == index
        assert math.isclose(rate_at(index), 1e-3 * math.sqrt(2) ** index, rel_tol=5e-3)
    assert [rate_at(index) for index in (-2, 0, 1, 4)] == [5e-4, 1e-3, 1.41e-3, 4e-3]


def test_smoothing_is_the_mean_of_neighbors():
    losses = np.random.default_rng(0).normal(size=40).tolist()
    means = smoothed(losses)
    for i in range(40):
        assert math.isclose(means[i], np.mean(losses[max(0, i - 3) : i + 4]))


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([2.0, 2.0, 1.5, 3.9, 1.0], None),
        ([2.0, 2.0, 1.5, 4.1, 1.0], 3),
        ([2.0, 2.0, math.nan, 1.0], 2),
        ([2.0, 1.0, 1.0, math.inf], 3),
    ],
)
def test_divergence_is_twice_the_beginning_or_no_number(losses, step):
    assert divergence(losses) == step


def test_the_bracket_lies_below_the_lowest_loss_and_holds_the_given_rate():
    rates = [1e-6 * 10 ** (i / 8) for i in range(56)]
    losses = [3.0 - 2 * math.exp(-(math.log10(rate / 1e-2) ** 2)) if rate < 0.1 else 50.0 for rate in rates]
    start = bracket(rates, losses, 1e-5)
    top = index_of(1e-2)
    assert start == sorted({top, top - 2, top - 4, top - 6, index_of(1e-5)})
    assert index_of(1.0) not in bracket(rates, losses, 1.0)  # it diverged there
    assert bracket(rates, losses, 1e-2) == start[1:]


def runs_of(optimum, start, noise=0.0, seed=0):
    """The rounds of a search whose loss is a parabola of log(rate), and what was trained for it."""
    made, generator = [], random.Random(seed)

    def loss(index, length):
        made.append((index, length))
        return 1 / length + 0.01 * (index - optimum) ** 2 + noise * generator.gauss(0, 1)

    return halve(loss, start), made


def test_halving_finds_the_optimum_of_a_parabola():
    for optimum in range(-12, 6):
        rounds, made = runs_of(optimum, [-8, -6, -4, -2, 1])
        assert min(rounds[1], key=rounds[1].get) == optimum
        assert len(made) == len(set(made)) == sum(map(len, rounds))


def test_halving_keeps_to_its_cost():
    for seed in range(200):
        start = random.Random(seed).sample(range(-20, 20), random.Random(seed).randint(1, 5))
        rounds, made = runs_of(0, start, noise=1.0, seed=seed)
        assert sum(length for _, length in made) <= module.RUNS_COST
        assert [length for _, length in made] == [1] * len(rounds[0]) + [2] * 3
        assert {index for index, _ in made[: len(rounds[0])]} == set(rounds[0]) >= set(start)
        middle = min(rounds[0], key=rounds[0].get)
        assert set(rounds[1]) == {middle - 1, middle, middle + 1}


def test_what_is_no_number_loses_and_of_equal_ones_the_lowest_rate_wins():
    rounds = halve(lambda index, length: math.nan if index > 0 else 1.0, [-2, 0, 2])
    assert rounds[0][2] == math.inf
    assert module.best(rounds[0]) == min(rounds[0]) == -6  # two more at the lower end


@pytest.mark.parametrize(("share", "factor"), [(1 / 4, 0.642), (1 / 32, 0.330), (0.9, 1.0), (2.0, 1.0)])
def test_the_rate_falls_with_the_horizon(share, factor):
    assert min(share, 1) ** 0.32 == pytest.approx(factor, rel=0.05)
    assert rate_at(module.at_whole_horizon(0, share)) / 1e-3 == pytest.approx(factor, rel=math.sqrt(math.sqrt(2)) - 1)


# Short runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("techniques", [[], [LinearToZero(warmup=0.5)], [Budget("24steps"), InfoBatch()]], ids=repr)
def test_a_short_run_is_the_run_itself_made_short(techniques, tmp_path):
    host = tiny_trainer(techniques, tmp_path)
    probe = probe_of(host.accel, 10)
    ran = short_run(host.accel, 2e-3, {"steps": 6.0}, probe=probe, each_step=True)
    own = [t for t in techniques if not isinstance(t, Budget)]
    alone = tiny_trainer(own, tmp_path, learning_rate=2e-3, max_steps=6)
    alone.train()
    assert ran.losses == [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert ran.loss == alone.evaluate(probe)["eval_loss"]
    assert (ran.steps, ran.spent["samples"], ran.evaluated) == (6, 48, 10)
    assert ran.flops == alone.state.total_flos


def test_warm_up_in_updates_shrinks_with_the_horizon(tmp_path):
    host = tiny_trainer([], tmp_path, warmup_steps=12)
    ran = short_run(host.accel, 2e-3, {"steps": 6.0}, warmup=12 / 24, each_step=True)
    alone = tiny_trainer([], tmp_path, learning_rate=2e-3, max_steps=6, warmup_steps=3)
    alone.train()
    assert ran.losses == [entry["loss"] for entry in alone.state.log_history if "loss" in entry]


def state_of(trainer):
    kept = ("args", "model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler", "state", "accelerator")
    generators = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()
    gradient_state = trainer.accelerator.gradient_state
    return (
        [id(getattr(trainer, name)) for name in kept],
        trainer.args.to_dict(),
        list(trainer.callback_handler.callbacks),
        generators,
        [parameter.grad for parameter in trainer.model.parameters()],
        gradient_state.dataloader_references,
    )


def test_the_trainer_stays_as_it_was(tmp_path):
    searched = tiny_trainer([InfoBatch()], tmp_path)
    before, weights = state_of(searched), weights_of(searched)
    files = sorted(tmp_path.rglob("*"))
    found = find_lr(searched, share=3)
    assert state_of(searched) == before
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(searched).items())
    assert sorted(tmp_path.rglob("*")) == files
    assert searched.techniques[0].run_ is searched.accel.view

    searched.train()
    other = tiny_trainer([InfoBatch()], tmp_path)
    other.train()
    assert all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(searched).items())

    # The same a second time, and within the share.
    again = find_lr(tiny_trainer([InfoBatch()], tmp_path), share=3)
    assert again.to_dict() | {"seconds": 0} == found.to_dict() | {"seconds": 0}
    assert found.cost <= 3 and found.runs == 1 + sum(len(r["losses"]) for r in found.rounds)
    assert found.given == 5e-3 and any(found.learning_rate <= rate for rate in found.rounds[1]["losses"])
    found.plot(tmp_path / "plot.png")
    found.save(tmp_path / "found.json")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_copy_of_an_evaluated_model_does_not_lead_back_to_it(tmp_path):
    host = tiny_trainer([], tmp_path, bf16=True)
    host.evaluate()  # accelerate wraps its forward
    short_run(host.accel, 1e-2, {"steps": 3.0})
    assert all(parameter.grad is None for parameter in host.model.parameters())


def test_a_model_that_trains_at_no_rate_is_named(tmp_path):
    host = tiny_trainer([], tmp_path, model=tiny_llama())
    with torch.no_grad():
        host.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="find_lr.*no learning rate"):
        find_lr(host, share=3)


@pytest.mark.parametrize(
    ("settings", "share", "sentence"),
    [
        ({}, 0.5, "find_lr\\(share=0.5\\): 0.5 of the budget is about 12 updates, and a search needs 39"),
        ({}, 0.0, "share must be > 0"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, 3.0, "follows the metric"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, share, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        find_lr(tiny_trainer([], tmp_path, **settings), share=share)


def test_other_trainers_and_given_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hosts no techniques"):
        find_lr(tiny_trainer([], tmp_path, trainer_class=Trainer))
    plain = tiny_trainer([], tmp_path)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=1.0)
    given = AccelTrainer(plain.model, plain.args, train_dataset=plain.train_dataset, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="has an optimizer already"):
        find_lr(given, share=3)


def test_a_run_that_a_technique_gives_up_has_diverged(tmp_path):
    host = tiny_trainer([GradientSpikeGuard(max_ratio=1.0001, patience=1)], tmp_path)
    run = short_run(host.accel, 1e-3, {"steps": 30.0}, each_step=True, probe=probe_of(host.accel, 4))
    assert run.loss == math.inf == run.losses[-1] and divergence(run.losses) == len(run.losses) - 1 == run.steps


@dataclass(eq=False)
class Rates(Technique):
    """Remembers the highest rate of each algorithm."""

    highest: ClassVar[dict[str, float]] = {}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            self.highest[group["algorithm"]] = max(group["lr"], self.highest.get(group["algorithm"], 0.0))


def test_in_the_range_test_a_rate_of_its_own_stays_below_itself(tmp_path):
    test, host = module._RangeTest(), tiny_trainer([Muon(lr=0.02), Rates()], tmp_path)
    short_run(host.accel, module.HIGHEST, {"steps": 14.0}, techniques=[test])
    assert Rates.highest == pytest.approx({"muon": 0.02 / math.sqrt(10), "adamw": 10 / math.sqrt(10)})
    assert test.rates_ == pytest.approx([1e-6 * 10 ** (i / 2) for i in range(14)])
