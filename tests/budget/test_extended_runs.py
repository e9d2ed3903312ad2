"""A run that goes on with a finished one, for a further budget: ``Budget("+10steps")``."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from hf_accel import Budget, Cosine, LinearToZero, WarmupStableDecay
from hf_accel.engine.optimization import REWARMED, entered
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of

SAVING = {"save_strategy": "steps", "save_steps": 2}


def rates_of(trainer):
    return {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_from_the_peak_there_is_nothing_to_return_to():
    shape = WarmupStableDecay(warmup=0.1, cooldown=0.25).schedule
    factor = entered(shape, 0.02, 1.0)
    for i in range(2, 101):
        assert factor(i / 100) == pytest.approx(1.0 if i < 10 else shape(i / 100))


@pytest.mark.parametrize("technique", [LinearToZero(), Cosine()])
def test_from_the_end_the_rate_returns_to_the_longer_schedule(technique):
    factor, back = entered(technique.schedule, 0.5, 0.0), 0.5 + 0.5 * REWARMED
    assert factor(0.5) == 0.0
    assert factor((0.5 + back) / 2) == pytest.approx(technique.schedule((0.5 + back) / 2) / 2)
    for i in range(51 + round(50 * REWARMED), 101):
        assert factor(i / 100) == pytest.approx(technique.schedule(i / 100))


def test_a_run_prolonged_from_its_stable_part_is_the_longer_run(tmp_path):
    """20 steps cool down from the 15th on; 12 more from the 14th are 26 steps, which cool down from the 20th on."""
    schedule = WarmupStableDecay(warmup=0.0, cooldown=0.25)
    short = tiny_trainer([Budget("20steps"), schedule], tmp_path / "short", **SAVING)
    short.train()
    more = tiny_trainer([Budget("+12steps"), schedule], tmp_path / "more", **SAVING)
    more.train(resume_from_checkpoint=str(tmp_path / "short"))
    whole = tiny_trainer([Budget("26steps"), schedule], tmp_path / "whole")
    whole.train()
    assert more.state.global_step == 26 and more.clock.limits == {"steps": 26}
    assert losses_of(more) == losses_of(whole) and rates_of(more) == rates_of(whole)
    assert largest_difference(weights_of(more), weights_of(whole)) == 0.0
    assert more.receipt.techniques[0]["report"] == {"steps_share": 1.0}


def test_a_finished_run_without_a_stable_part_is_warmed_up_anew(tmp_path):
    tiny_trainer([Budget("12steps")], tmp_path / "short", **SAVING).train()
    more = tiny_trainer([Budget("+12steps")], tmp_path / "more")
    more.train(resume_from_checkpoint=str(tmp_path / "short"))
    rates = rates_of(more)
    assert rates[12] > 0 and rates[13] == 0.0
    assert [rates[i] for i in range(14, 25)] == pytest.approx([5e-3 * (1 - (i - 1) / 24) for i in range(14, 25)])
    assert more.receipt.final_learning_rate == 0.0


def test_interrupted_it_goes_on_for_what_is_left(tmp_path):
    tiny_trainer([Budget("12steps")], tmp_path / "short", **SAVING).train()
    straight = tiny_trainer([Budget("+12steps")], tmp_path / "straight")
    straight.train(resume_from_checkpoint=str(tmp_path / "short"))
    broken = tiny_trainer([Budget("+12steps")], tmp_path / "broken", **SAVING)
    broken.add_callback(Stops(18))
    broken.train(resume_from_checkpoint=str(tmp_path / "short"))
    resumed = tiny_trainer([Budget("+12steps")], tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 24
    assert rates_of(resumed) == rates_of(straight) and losses_of(resumed) == losses_of(straight)


def test_twice_it_does_not_go_on_by_itself(tmp_path):
    tiny_trainer([Budget("4steps")], tmp_path / "short", **SAVING).train()
    tiny_trainer([Budget("+4steps")], tmp_path / "more", **SAVING).train(resume_from_checkpoint=str(tmp_path / "short"))
    with pytest.warns(UserWarning, match=r"Budget\(limit='\+4steps'\): the run has spent this budget already"):
        output = tiny_trainer([Budget("+4steps")], tmp_path / "more").train(resume_from_checkpoint=True)
    assert output.global_step == 8


def test_as_often_as_one_likes(tmp_path):
    tiny_trainer([Budget("4steps")], tmp_path / "0", **SAVING).train()
    for i in range(3):
        trainer = tiny_trainer([Budget("+2steps")], tmp_path / str(i + 1), **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / str(i)))
        assert trainer.state.global_step == 4 + 2 * (i + 1) and trainer.receipt.final_learning_rate == 0.0


def test_what_cannot_go_on_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"Budget\(limit='\+1h'\): there is no run to continue. Name it"):
        tiny_trainer([Budget("+1h")], tmp_path / "a").train()
    with pytest.raises(ValueError, match="there is no complete checkpoint of a run of hf_accel. Name another"):
        tiny_trainer([Budget("+1h")], tmp_path / "a").train(resume_from_checkpoint=str(tmp_path))
    tiny_trainer([Budget("2steps")], tmp_path / "b", **SAVING).train()
    with pytest.raises(ValueError, match="lies in output_dir, so .* Choose another output_dir"):
        tiny_trainer([Budget("+1h")], tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "b"))
    for limit in (["+1h", "3steps"], "+job"):
        with pytest.raises(ValueError, match="Put '\\+' on all limits or on none"):
            Budget(limit)
