"""Checks of the contract fail for techniques that break it, and compare with a run of the technique they are given."""

import random
from dataclasses import dataclass

import pytest
import torch

from hf_accel.technique import Technique
from hf_accel.testing import (
    check_checkpointing,
    check_evaluates_what_it_returns,
    check_every_option_matters,
    check_leaves_the_model_as_found,
    check_neutral_is_trainer,
    check_resumes_bit_exactly,
    check_resumes_early_and_late,
    check_stores_only_hyperparameters,
    check_tied_head,
    check_trains,
    check_trains_twice,
)


@dataclass(eq=False)
class Shrinks(Technique):
    """Shrinks the head after every step, less each time; keeps the contract."""

    rate: float = 0.01
    neutral = {"rate": 0.0}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.steps_ = 0

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps_ += 1
        with torch.no_grad():
            model.lm_head.weight.mul_(1 - self.rate / self.steps_)

    def state_dict(self, scope):
        return {"steps": self.steps_} if scope == "global" else {}

    def load_state_dict(self, scope, state):
        if scope == "global":
            self.steps_ = state["steps"]


@dataclass(eq=False)
class Keeps(Shrinks):
    """Keeps more than its hyperparameters in the constructor."""

    def __post_init__(self):
        super().__post_init__()
        self.steps_ = 0


@dataclass(eq=False)
class Ruins(Shrinks):
    """Ends with a model that knows less than at the beginning."""

    def on_train_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.mul_(-10)


@dataclass(eq=False)
class Always(Shrinks):
    """Shrinks where its neutral value says that nothing happens."""

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.mul_(0.99)


@dataclass(eq=False)
class Forgets(Shrinks):
    """Begins to count again after a resume."""

    def state_dict(self, scope):
        return {}

    def load_state_dict(self, scope, state):
        pass


@dataclass(eq=False)
class Carries(Shrinks):
    """Counts on in a second run."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps_ = getattr(self, "steps_", 0)


@dataclass(eq=False)
class Hooks(Shrinks):
    """Leaves a hook behind."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        model.lm_head.register_forward_hook(lambda *_: None)


@dataclass(eq=False)
class Unties(Shrinks):
    """Gives the head a weight apart from that of the embeddings, which a checkpoint does not hold."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


@dataclass(eq=False)
class Draws(Shrinks):
    """Draws a number in the forward pass, and another one where that is computed again."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)

        def scaled(module, inputs):
            factor = self.generator_.uniform(0.9, 1.1) if module.training else 1.0
            return (factor * inputs[0], *inputs[1:])

        self.generator_ = random.Random(0)
        self.handle_ = model.model.layers[1].mlp.register_forward_pre_hook(scaled)

    def on_step_begin(self, args, state, control, **kwargs):
        self.generator_ = random.Random(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle_.remove()


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (Keeps, check_stores_only_hyperparameters, "before training"),
        (Ruins, check_trains, "the loss on other examples went from"),
        (Always, check_neutral_is_trainer, "the losses are not Trainer's"),
        (Always, check_every_option_matters, "changes nothing"),
        (Forgets, check_resumes_bit_exactly, "after resuming at 13"),
        (Forgets, check_resumes_early_and_late, "after resuming at 8"),
        (Carries, check_trains_twice, "the second run differs from the first"),
        (Hooks, check_leaves_the_model_as_found, "it left the model changed"),
        (Ruins, check_evaluates_what_it_returns, "evaluated"),
        (Draws, check_checkpointing, "activation checkpointing changes the losses"),
        (Unties, check_tied_head, "after resuming at 12"),
    ],
)
def test_a_technique_that_breaks_the_contract_fails(broken, check, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check(broken(), tmp_path)


def test_a_technique_with_other_values_is_compared_with_a_run_of_its_own(tmp_path):
    for rate in (0.01, 0.5):
        check_resumes_bit_exactly(Shrinks(rate=rate), tmp_path / str(rate))
        check_trains_twice(Shrinks(rate=rate), tmp_path)
        check_leaves_the_model_as_found(Shrinks(rate=rate), tmp_path)
