"""`hf_accel.budget.budget`: limits as they are written, and progress against a count in fractions."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_accel import Budget, LayerFreezing, LearningRateSearch, SharpnessAware
from hf_accel.clock import Clock
from hf_accel.engine.reserve import guess_saving
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)


def of_one_length(features):
    """Batches of 8 rows of 24 positions, so that all steps cost the same."""
    batch = collate_padded(features)
    return {k: torch.nn.functional.pad(v, (0, 24 - v.shape[1]), value=-100 * (k == "labels")) for k, v in batch.items()}


def counted(techniques, directory, **args):
    trainer = tiny_trainer(techniques, directory, **args)
    trainer.data_collator = of_one_length
    return trainer


def matrices(trainer, rows=8, positions=24):
    """Operations of a forward pass, by hand: two for each weight of a matrix and position, and attention's two products
    of the whole square."""
    config = trainer.model.config
    weights = sum(p.numel() for name, p in trainer.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = config.num_hidden_layers * 2 * positions * config.hidden_size
    return 2 * rows * positions * (weights + attention)


HAND_WRITTEN = {
    "500steps": {"steps": 500},
    "1.5epochs": {"epochs": 1.5},
    "1e9tok": {"tokens": 1e9},
    "30min": {"seconds": 1800},
    "2h": {"seconds": 7200},
    "2d": {"seconds": 172800},
}


@pytest.mark.parametrize("text", HAND_WRITTEN)
def test_a_limit_is_an_amount_of_one_unit(text):
    assert Budget(text).budget().amounts == HAND_WRITTEN[text] == Budget([text]).budget().amounts


@pytest.mark.parametrize("limit", [[], ["1h", "30min"], ["5steps", "5 steps"]])
def test_a_unit_is_limited_once_and_one_is(limit):
    with pytest.raises(ValueError, match="each unit may be limited once"):
        Budget(limit)


@pytest.mark.parametrize("limit", [30, 0.5, ["30min", 4], None])
def test_a_limit_is_text(limit):
    with pytest.raises(ValueError, match="a limit must be text with a unit. Write, for example, '30min'"):
        Budget(limit).budget()


def test_the_first_limit_that_is_reached_ends_the_run():
    """Steps of 4, 8, 12 ... samples and 30 tokens each, against a count that shares no code with the clock."""
    limits = Budget(["100samples", "250tok", "9steps"]).budget().amounts
    clock = Clock(limits)
    samples, tokens, steps, seen = 0, 0, 0, []
    while not clock.done:
        clock.advance(samples=4 * (steps + 1), tokens=30)
        samples, tokens, steps = samples + 4 * (steps + 1), tokens + 30, steps + 1
        exact = max(Fraction(samples, 100), Fraction(tokens, 250), Fraction(steps, 9))
        seen.append(clock.progress == pytest.approx(float(min(exact, 1))))
    assert all(seen) and (samples, tokens, steps) == (112, 210, 7)


def test_going_on_under_another_limit_is_another_share():
    short, long = Clock(Budget("12steps").budget().amounts), Clock(Budget("48steps").budget().amounts)
    while not short.done:
        short.advance()
    long.load_state_dict(short.state_dict())
    assert (long.progress, long.done) == (0.25, False)
    same = Clock(Budget("12steps").budget().amounts)
    same.load_state_dict(short.state_dict())
    assert (same.progress, same.done) == (1.0, True)


def test_operations_are_spent_and_shown(tmp_path):
    probe = counted([Budget(["1step", "1e15flop"])], tmp_path)
    probe.train()
    step = probe.clock.spent["flops"]
    assert step == pytest.approx(3 * matrices(probe), rel=0.02)
    trainer = counted([Budget(f"{20.5 * step:.0f}flop")], tmp_path)
    trainer.train()
    receipt = trainer.receipt
    assert trainer.state.global_step == 20 and receipt.final_learning_rate == 0.0
    assert receipt.executed_flops == receipt.model_flops == 20 * step
    assert 0 < receipt.techniques[0]["report"]["utilization"] < 1
    assert receipt.cost(price_per_hour=7200.0) == pytest.approx(2 * receipt.wall_seconds)
    assert counted([Budget("1step")], tmp_path).accel.gauges == {}


def test_what_is_frozen_is_not_spent_and_what_is_done_twice_is(tmp_path):
    plain, frozen, twice = (
        counted([Budget(["4steps", "1e15flop"]), *others], tmp_path / str(i))
        for i, others in enumerate([[], [LayerFreezing(start=0.0)], [SharpnessAware(every=1)]])
    )
    for trainer in (plain, frozen, twice):
        trainer.train()
    assert frozen.receipt.executed_flops < plain.receipt.executed_flops
    assert twice.receipt.executed_flops == 2 * plain.receipt.executed_flops


@pytest.mark.parametrize("limit", ["5e8flop", "2000tok"])
def test_stopped_and_resumed_they_end_at_the_same_step(limit, tmp_path):
    whole = counted([Budget(limit)], tmp_path / "whole", save_strategy="steps", save_steps=7)
    whole.train()
    resumed = counted([Budget(limit)], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.clock.spent["flops"] == whole.clock.spent["flops"]
    assert resumed.clock.spent["tokens"] == whole.clock.spent["tokens"]
    assert resumed.state.global_step == whole.state.global_step > 7


@pytest.mark.parametrize("limit", ["1e5flop", "10tok", "0.02s"])
def test_too_little_for_a_step(limit, tmp_path):
    trainer = counted([Budget(limit)], tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    sentence = rf"Budget\(limit='{limit}'\) is too small for one step and the evaluation and checkpoint after it"
    with pytest.raises(ValueError, match=sentence):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_a_finished_run_returns_its_result_as_in_trainer(tmp_path):
    outcomes = []
    for name, techniques, args in (
        ("plain", [], {"trainer_class": Trainer, "max_steps": 8}),
        ("budget", [Budget("8steps")], {}),
    ):
        first = tiny_trainer(techniques, tmp_path / name, save_strategy="steps", save_steps=8, **args)
        first.train()
        again = tiny_trainer(techniques, tmp_path / name, **args)
        said = r"Budget\(limit='8steps'\): the run has spent this budget already, .*larger one, or extend .* '\+30min'"
        with pytest.warns(UserWarning, match=said) if techniques else contextlib.nullcontext():
            output = again.train(resume_from_checkpoint=True)
        assert largest_difference(weights_of(first), weights_of(again)) == 0.0
        outcomes.append((output.global_step, output.training_loss, again.state.epoch))
    assert outcomes[0] == outcomes[1] == (8, 0.0, again.state.epoch)
    assert again.receipt.steps == 8 and again.receipt.final_learning_rate == 0.0


def test_a_run_without_time_left_returns_what_it_has(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 4

    first = tiny_trainer([Budget(["10steps", "1h"])], tmp_path, save_strategy="steps", save_steps=4)
    first.add_callback(Stops())
    first.train()
    again = tiny_trainer([Budget(["10steps", "1h"])], tmp_path)
    again.clock.now = iter(range(0, 10**9, 4000)).__next__
    with pytest.warns(UserWarning, match="has spent this budget already"):
        assert again.train(resume_from_checkpoint=True).global_step == 4
    assert largest_difference(weights_of(first), weights_of(again)) == 0.0


@pytest.mark.ci
@pytest.mark.parametrize(("limit", "unit", "amount"), [("3e9flop", "flops", 3e9), ("24000tok", "tokens", 24000)])
def test_a_search_of_the_rate_takes_its_share(limit, unit, amount, tmp_path):
    trainer = counted([Budget(limit), LearningRateSearch(share=0.8)], tmp_path)
    trainer.train()
    assert trainer.clock.excluded_cost[unit] == 0.8 * amount
    assert 0.9 * 0.2 * amount < trainer.clock.spent[unit] <= 0.2 * amount
    assert trainer.receipt.final_learning_rate == 0.0


class Machine:
    """A clock that moves as a machine works: so much for a step and an evaluated batch, and slower from a time on."""

    def __init__(self, trainer, step, batch, slower=1.0, since=math.inf):
        self.seconds, self.slower, self.since = 0.0, slower, since
        trainer.clock.now = lambda: self.seconds
        trainer.training_step = self.working(trainer.training_step, step)
        trainer.prediction_step = self.working(trainer.prediction_step, batch)

    def working(self, method, seconds):
        def work(*args, **kwargs):
            self.seconds += seconds * (self.slower if self.seconds >= self.since else 1.0)
            return method(*args, **kwargs)

        return work


EVALUATED = {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 0.25}
"""16 batches."""


def test_on_a_steady_machine_time_is_kept_with_the_last_evaluation(tmp_path):
    trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED)
    Machine(trainer, step=0.5, batch=0.25)
    trainer.train()
    assert 60 * 0.95 < trainer.clock.seconds <= 60
    assert trainer.receipt.final_learning_rate == 0.0
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 4 and evaluations[-1]["step"] == trainer.state.global_step


def test_an_evaluation_that_would_make_the_run_late_is_left_out(tmp_path):
    trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED | {"eval_steps": 0.19})
    Machine(trainer, step=0.5, batch=0.25)
    trainer.train()
    assert 60 * 0.95 < trainer.clock.seconds <= 60
    steps = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(steps) == 5 and steps[-1] == trainer.state.global_step  # at 19, 38, 57, 76 and 100, but not at 95 %


@pytest.mark.ci
def test_evaluations_of_a_stream_are_kept_back_for_once_one_has_been_made(tmp_path):
    rows = CountingText(16)

    class Stream(IterableDataset):
        def __iter__(self):
            return (rows[i] for i in range(16))

    for stream in (Stream(), datasets.Dataset.from_list([rows[i] for i in range(16)]).to_iterable_dataset()):
        trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED)
        trainer.eval_dataset = stream
        Machine(trainer, step=0.5, batch=0.25)
        trainer.train()
        assert 60 * 0.95 < trainer.clock.seconds <= 60
        assert trainer.state.log_history[-2]["step"] == trainer.state.global_step
        assert "eval_loss" in trainer.state.log_history[-2]


def test_tokens_of_images_are_refused_before_the_first_update(tmp_path):
    trainer = tiny_trainer([Budget("100tok")], tmp_path, modality="image")
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match=r"Budget\(.*\) does not support tokens here .* Give the budget in steps"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("slower", [2.0, 4.0])
@pytest.mark.parametrize("since", [20, 30, 45])
def test_a_machine_that_slows_down_is_late_by_a_step_and_half_an_evaluation_at_most(slower, since, tmp_path):
    trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED)
    Machine(trainer, step=0.5, batch=0.25, slower=slower, since=since)
    trainer.train()
    assert 60 * 0.9 < trainer.clock.seconds <= 60 + slower * (0.5 + 16 * 0.25 / 2)
    assert trainer.receipt.final_learning_rate == 0.0


def test_more_is_kept_back_on_a_machine_that_is_slower_than_when_it_last_evaluated(tmp_path):
    trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED | {"eval_steps": 0.5})
    Machine(trainer, step=0.5, batch=0.25, slower=2.0, since=35)  # it has evaluated at about 28
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 2 and evaluations[-1]["step"] == trainer.state.global_step
    assert 60 * 0.95 < trainer.clock.seconds <= 60 + 2 * 0.5  # the last evaluation takes 8


def test_seconds_of_a_run_that_was_stopped_and_resumed_are_kept(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 50

    saving = {"save_strategy": "steps", "save_steps": 40}
    first = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED, **saving)
    first.add_callback(Stops())
    Machine(first, step=0.5, batch=0.25)
    first.train()
    spent = first.clock.seconds
    second = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED, **saving)
    Machine(second, step=0.5, batch=0.25)
    second.train(resume_from_checkpoint=True)
    assert spent - 2.1 < second.clock.seconds - second.clock.now() <= spent  # but for what is after the last heartbeat
    assert 60 * 0.95 < second.clock.seconds <= 60 and second.receipt.final_learning_rate == 0.0


def test_a_first_step_that_compiles_changes_neither_the_reserve_nor_the_end(tmp_path):
    trainer = tiny_trainer([Budget("60s")], tmp_path, **EVALUATED)
    machine = Machine(trainer, step=0.5, batch=0.25)
    step, reserves = trainer.training_step, []

    def first_compiles(*args, **kwargs):
        machine.seconds += 29.0 * (trainer.state.global_step == 0)
        reserves.append(trainer.clock.reserve)
        return step(*args, **kwargs)

    trainer.training_step = first_compiles
    trainer.train()
    assert 60 * 0.95 < trainer.clock.seconds <= 60 and len(reserves) > 20
    assert reserves == pytest.approx([reserves[0]] * len(reserves), rel=0.15)


def test_of_adapters_a_checkpoint_holds_the_trained_weights_alone():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = 4 * sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert guess_saving(model) == pytest.approx(0.1 + 3 * trained / 300e6, rel=1e-9)
    whole = tiny_llama()
    size = 4 * sum(p.numel() for p in whole.parameters())
    assert guess_saving(whole) == pytest.approx(0.1 + 3 * size / 300e6, rel=1e-9)
