"""Trainers whose handler gives callbacks another model and other arguments, as setfit's does."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_accel import Budget, ExponentialMovingAverage, InfoBatch, attach
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of


class Whole:
    """What its users call the model: a body, and more."""

    def __init__(self, body):
        self.body = body


class Theirs(TrainingArguments):
    """Arguments of another library."""


class Sees(TrainerCallback):
    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.add((type(args), type(model)))
        control.should_training_stop |= state.global_step == 7


def of_another_library(tmp_path, **args):
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer, **args)
    whole, handler = Whole(trainer.model), trainer.callback_handler
    theirs = copy.copy(trainer.args)
    theirs.__class__ = Theirs

    def call_event(event, args, state, control, **kwargs):
        for callback in handler.callbacks:
            control = getattr(callback, event)(theirs, state, control, model=whole, **kwargs) or control
        return control

    handler.call_event = call_event
    return trainer


def test_techniques_and_the_clock_are_given_trainers_model(tmp_path):
    techniques = lambda: [Budget("10steps"), ExponentialMovingAverage(half_life=2), InfoBatch(keep=0.5)]  # noqa: E731
    ours = tiny_trainer(techniques(), tmp_path / "ours")
    theirs = of_another_library(tmp_path / "theirs")
    attach(theirs, techniques())
    for trainer in (ours, theirs):
        trainer.add_callback(Sees())
        torch.manual_seed(0)
        trainer.train()
    assert theirs.state.global_step == ours.state.global_step == 7
    assert losses_of(theirs) == losses_of(ours)
    assert largest_difference(weights_of(theirs), weights_of(ours)) == 0.0
    sees = next(c for c in theirs.callback_handler.callbacks if isinstance(c, Sees))
    assert sees.seen == {(Theirs, Whole)}


def test_a_budget_ends_the_run(tmp_path):
    trainer = of_another_library(tmp_path)
    attach(trainer, [Budget("3steps")])
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.receipt.final_learning_rate == 0.0


def test_a_failed_attachment_leaves_the_handler_as_found(tmp_path):
    trainer = of_another_library(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    handler = trainer.callback_handler
    before = type(handler), handler.call_event, list(handler.callbacks)
    with pytest.raises(ValueError, match="reduce_lr_on_plateau"):
        attach(trainer, [Budget("3steps")])
    assert (type(handler), handler.call_event, handler.callbacks) == before and type(trainer) is Trainer
