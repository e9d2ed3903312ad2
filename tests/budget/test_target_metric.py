"""`hf_accel.budget.target_metric`: where a run stops, against the evaluations of one that does not."""

from __future__ import annotations

import pytest

from hf_accel import Budget, ExponentialMovingAverage, TargetMetric
from hf_accel.testing import largest_difference, tiny_trainer, weights_of

EVERY = {"eval_strategy": "steps", "eval_steps": 2}


def losses_on(trainer):
    return {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}


@pytest.mark.parametrize("others", [[], [ExponentialMovingAverage(4.0)]], ids=["raw", "averaged"])
def test_it_stops_at_the_first_evaluation_that_is_good_enough(others, tmp_path):
    whole = tiny_trainer([*others, TargetMetric()], tmp_path / "whole", **EVERY)
    whole.train()
    losses = losses_on(whole)
    assert len(losses) == 12 and whole.receipt.techniques[-1]["report"] == {"best": min(losses.values())}
    target = losses[14] + 1e-6
    first = min(step for step, loss in losses.items() if loss <= target)
    stopped = tiny_trainer([*others, Budget("3epochs"), TargetMetric("loss", target)], tmp_path / "stopped", **EVERY)
    stopped.train()
    assert stopped.state.global_step == first < 24
    report = stopped.receipt.techniques[-1]["report"]
    assert report == {"best": losses[first], "reached_at_step": first, "reached_at_progress": first / 24}
    ended = stopped.state.log_history[-1]
    samples = ended["train_samples_per_second"] * ended["train_runtime"]
    assert samples == pytest.approx(stopped.receipt.samples, rel=0.01)
    assert stopped.evaluate()["eval_loss"] == pytest.approx(losses[first])  # of what it returns


def test_more_is_better_of_what_is_no_loss(tmp_path):
    def steps(prediction):
        return {"f1": trainer.state.global_step / 24}

    trainer = tiny_trainer([TargetMetric("f1", 0.5)], tmp_path, **EVERY)
    trainer.compute_metrics = steps
    trainer.train()
    assert trainer.state.global_step == 12


def test_less_is_better_where_that_is_declared(tmp_path):
    def falling(prediction):
        return {"nll": 1 - trainer.state.global_step / 24}

    trainer = tiny_trainer([TargetMetric("nll", 0.5, greater_is_better=False)], tmp_path, **EVERY)
    trainer.compute_metrics = falling
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_metric_without_a_direction_is_refused():
    with pytest.raises(ValueError, match=r"metric\('nll'\): its direction is not declared. Set greater_is_better="):
        TargetMetric("nll", 0.5)


def test_where_there_are_no_evaluations_it_asks_for_some(tmp_path):
    trainer = tiny_trainer([TargetMetric("eval_loss")], tmp_path)
    trainer.train()
    assert len(losses_on(trainer)) >= 12


def test_a_metric_that_is_not_there_is_named(tmp_path):
    trainer = tiny_trainer([TargetMetric("accuracy", 0.9)], tmp_path, **EVERY)
    with pytest.raises(ValueError, match=r"TargetMetric\(metric='accuracy'.*: the evaluation returns no 'accuracy'"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_watching_changes_nothing(tmp_path):
    runs = []
    for techniques in ([], [TargetMetric()]):
        trainer = tiny_trainer(techniques, tmp_path, **EVERY)
        trainer.train()
        runs.append(weights_of(trainer))
    assert largest_difference(*runs) == 0.0
