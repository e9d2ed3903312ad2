"""What is predicted against what a run then takes, on a clock that moves by known amounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from hf_accel import Budget, InfoBatch
from hf_accel.technique import Technique
from hf_accel.testing import tiny_trainer
from hf_accel.tools.calibration import Forecast, Rhythm, calibrate


class Hands:
    """A clock that others move."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@dataclass(eq=False)
class Slow(Technique):
    """Takes 3 seconds to begin, 1 for a step and 0.25 for a batch of an evaluation."""

    hands: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.hands.seconds += 3.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.hands.seconds += 1.0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.hands.seconds += 0.25


def slow_trainer(directory, *techniques, **args):
    hands = Hands()
    trainer = tiny_trainer([*techniques, Slow(hands)], directory, **args)
    trainer.clock.now = hands
    return trainer


@pytest.mark.parametrize(
    "args, techniques",
    [
        ({"num_train_epochs": 2}, []),
        ({"num_train_epochs": 2, "eval_strategy": "epoch"}, []),
        ({"num_train_epochs": 2, "eval_strategy": "epoch", "eval_on_start": True}, [InfoBatch(keep=1.0)]),
        ({"max_steps": 12, "eval_strategy": "steps", "eval_steps": 4}, []),
        ({"max_steps": 12, "enable_jit_checkpoint": True}, []),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "epoch"}, [Budget("20steps")]),
    ],
    ids=["no evaluation", "epochs", "on a stream", "steps", "checkpoints on a signal", "fractions"],
)
def test_a_run_takes_what_was_predicted(args, techniques, tmp_path):
    trainer = slow_trainer(tmp_path, *techniques, **args)
    forecast = calibrate(trainer, seconds=10.0)
    steps = forecast.steps(trainer.accel.limits().amounts)
    assert (forecast.start, forecast.step) == (3.0, 1.0)
    assert trainer.state.global_step == 0 and trainer.clock.now.seconds == forecast.cost
    trainer.train()
    assert trainer.receipt.steps == steps
    assert trainer.receipt.wall_seconds == pytest.approx(forecast.seconds(steps))


def test_seconds_buy_steps(tmp_path):
    trainer = slow_trainer(tmp_path, Budget("40s"), eval_strategy="epoch")
    forecast = calibrate(trainer, seconds=6.0)
    steps = forecast.steps(trainer.accel.limits().amounts)
    trainer.train()
    # The budget keeps back an evaluation, which the forecast counts as it comes, at the end of each epoch.
    assert abs(trainer.receipt.steps - steps) <= 1 + forecast.evaluation
    assert forecast.seconds(steps) <= 40


def test_other_units():
    spent = {"steps": 1.0, "tokens": 100.0, "epochs": 0.1, "samples": 8.0}
    forecast = Forecast(2.0, 0.5, 4.0, 1.0, 8, spent, 20, 30.0, evaluations=Rhythm(each_step=0.1, once=1.0))
    assert forecast.steps({"tokens": 1e4}) == 100 and forecast.steps({"epochs": 3}) == 30
    assert forecast.steps({"epochs": 3, "seconds": 1000, "samples": 80}) == 10
    assert forecast.seconds(10) == 2 + 4 + 10 * (0.5 + 0.4)
    assert forecast.steps({"seconds": 15}) == 10
    with pytest.raises(ValueError, match=r"budget: the start, one step and the evaluations take 6.9 s.*Give more"):
        forecast.steps({"seconds": 6})
    forecast.spent["tokens"] = 0.0
    with pytest.raises(ValueError, match=r"budget: the batches hold no tokens\. Give samples or epochs"):
        forecast.steps({"tokens": 1e4})


def test_operations_are_counted_for_a_budget_of_them(tmp_path):
    trainer = slow_trainer(tmp_path, Budget("1e9flop"))
    forecast = calibrate(trainer, seconds=6.0)
    trainer.train()
    assert trainer.receipt.steps == pytest.approx(forecast.steps(trainer.accel.limits().amounts), rel=0.1)
