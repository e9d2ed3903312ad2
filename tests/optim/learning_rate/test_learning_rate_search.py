from __future__ import annotations

import pytest
from transformers.trainer_utils import HPSearchBackend

from hf_accel import Budget, LearningRateSearch, LinearToZero
from hf_accel.optim.learning_rate import learning_rate_search
from hf_accel.testing import losses_of, tiny_trainer
from hf_accel.updates.learning_rates import rate_at

pytestmark = pytest.mark.ci


class Ticking:
    """A clock on which every look takes a millisecond."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-3
        return self.now


def rates_of(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_the_run_is_that_of_the_rate_that_was_found(tmp_path):
    technique = LearningRateSearch()
    searched = tiny_trainer([technique], tmp_path)
    searched.train()
    report = searched.receipt.techniques[0]["report"]
    assert report["given"] == 5e-3 and report["learning_rate"] in {rate_at(i) for i in range(-40, 40)}
    assert report["learning_rate"] != report["given"]
    known = tiny_trainer([], tmp_path, learning_rate=report["learning_rate"])
    known.train()
    assert losses_of(searched) == losses_of(known)
    assert searched.receipt.seconds["0.LearningRateSearch"] > 0
    assert searched.receipt.samples == known.state.global_step * 8  # the search's are in its report


@pytest.mark.parametrize("limit", ["120steps", "15epochs", "960samples"])
def test_a_budget_is_shared_with_the_search(limit, tmp_path):
    technique = LearningRateSearch(share=0.8)
    trainer = tiny_trainer([Budget(limit), technique, LinearToZero(warmup=0.25)], tmp_path)
    trainer.train()
    report = trainer.receipt.techniques[1]["report"]
    assert 0.6 * 96 < report["steps"] + report["evaluated"] / 8 / 3 <= 96
    assert trainer.state.global_step == 24  # what is left
    assert trainer.receipt.techniques[0]["report"] == {f"{next(iter(trainer.clock.limits))}_share": 1.0}
    # The schedule begins and ends in what is left.
    peak = report["learning_rate"]
    assert rates_of(trainer)[:7] == pytest.approx([peak * i / 6 for i in range(7)])
    assert trainer.receipt.final_learning_rate == 0.0 and trainer.clock.progress == 1.0


@pytest.mark.ci  # it takes real seconds
def test_seconds_are_shared_with_the_search(tmp_path):
    technique = LearningRateSearch(share=0.5)
    trainer = tiny_trainer([Budget("3s"), technique, LinearToZero(warmup=0.25)], tmp_path)
    trainer.clock.now = Ticking()
    trainer.train()
    clock = trainer.clock
    assert 0.5 < clock.excluded_cost["seconds"] <= 1.5
    assert clock.seconds <= 3.05 and clock.progress == 1.0
    rates = rates_of(trainer)
    peak = technique.report()["learning_rate"]
    assert rates[0] == 0.0 and 0.8 * peak < max(rates) <= peak
    assert trainer.receipt.final_learning_rate == 0.0


def test_a_resumed_run_does_not_search_again(tmp_path, monkeypatch):
    techniques = [Budget("120steps"), LearningRateSearch(share=0.8)]
    straight = tiny_trainer(techniques, tmp_path / "straight", save_strategy="steps", save_steps=10)
    straight.train()

    def no_search(*args, **kwargs):
        raise AssertionError("it searches")

    monkeypatch.setattr(learning_rate_search, "search", no_search)
    resumed = tiny_trainer([Budget("120steps"), LearningRateSearch(share=0.8)], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-10"))
    assert losses_of(resumed) == losses_of(straight)
    assert rates_of(resumed) == rates_of(straight)
    assert resumed.receipt.techniques[1]["report"] == straight.receipt.techniques[1]["report"]
    assert resumed.state.global_step == 24


@pytest.mark.parametrize(
    ("limit", "share", "sentence"),
    [
        ("24steps", 0.5, r"LearningRateSearch\(share=0.5\): 0.5 of the budget is about 12 updates, and a search needs"),
        ("24steps", 1.0, r"LearningRateSearch\(share=1.0\) leaves nothing of Budget\(limit='24steps'\) for"),
    ],
)
def test_budgets_that_are_too_small_are_refused(limit, share, sentence, tmp_path):
    trainer = tiny_trainer([Budget(limit), LearningRateSearch(share=share)], tmp_path)
    with pytest.raises(ValueError, match=sentence):
        trainer.train()


def test_a_search_over_the_rate_that_trainer_makes_is_refused(tmp_path):
    """A trial of Trainer's hyperparameter search, as ray gives it."""
    trainer = tiny_trainer([LearningRateSearch()], tmp_path)
    trainer.hp_search_backend = HPSearchBackend.RAY
    with pytest.raises(ValueError, match="does not support a hyperparameter_search of learning_rate .* Remove"):
        trainer.train(trial={"learning_rate": 1e-3})
