"""Check one technique on one process."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types as at
import numpy as np
import torch

from hf_accel.bounds import field_hints
from hf_accel.technique import Technique
from hf_accel.testing.probes import again, largest_difference, losses_of, tiny_trainer, weights_of
from hf_accel.testing.runs import (
    SETTINGS,
    assert_evaluates_what_it_returns,
    assert_resumes,
    assert_saves_what_it_returns,
    assert_trains,
    plain_run,
    straight_run,
)

__all__ = [
    "CHECKS",
    "bad_values",
    "check_evaluates_what_it_returns",
    "check_every_option_matters",
    "check_leaves_the_model_as_found",
    "check_micro_batch_invariant",
    "check_names_bad_values",
    "check_neutral_is_trainer",
    "check_resumes_bit_exactly",
    "check_resumes_early_and_late",
    "check_stores_only_hyperparameters",
    "check_trains",
    "check_trains_twice",
    "other_values",
]


def check_stores_only_hyperparameters(technique: Technique, directory: Path) -> None:
    """Check that the constructor stores only the fields, and draws from no global generator."""
    before = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    fresh = again(technique)
    fields = {f.name for f in dataclasses.fields(technique)}  # type: ignore[arg-type]
    assert set(vars(fresh)) == fields, f"{fresh!r} holds {set(vars(fresh)) - fields} before training"
    after = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]), f"{fresh!r} draws from a global generator"
    for field in dataclasses.fields(technique):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        assert has_default, f"{type(technique).__name__}.{field.name} has no default"


def check_names_bad_values(technique: Technique, directory: Path) -> None:
    """Check that a value out of bounds raises an error that names the technique, the field and the value."""
    for name, bad in bad_values(type(technique)):
        try:
            dataclasses.replace(technique, **{name: bad})  # type: ignore[type-var]
        except ValueError as error:
            message = str(error)
            assert all(part in message for part in (type(technique).__name__, name, repr(bad))), message
        else:
            raise AssertionError(f"{type(technique).__name__}({name}={bad!r}) was accepted")


def bad_values(kind: type[Technique]) -> Iterator[tuple[str, Any]]:
    """Yield values that break the declared bounds, with their fields."""
    hints = field_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        for bound in _bounds(hints[field.name]):
            if isinstance(bound, at.Gt):
                yield field.name, bound.gt
            elif isinstance(bound, at.Ge):
                yield field.name, bound.ge - 1  # type: ignore[operator]
            elif isinstance(bound, at.Lt):
                yield field.name, bound.lt
            elif isinstance(bound, at.Le):
                yield field.name, bound.le + 1  # type: ignore[operator]


def _bounds(hint: Any) -> list[Any]:
    if not hasattr(hint, "__metadata__"):
        return [bound for option in get_args(hint) for bound in _bounds(option)]
    return [b for item in hint.__metadata__ for b in (item if isinstance(item, at.GroupedMetadata) else (item,))]


def check_trains(technique: Technique, directory: Path) -> None:
    """Check that training lowers the loss on other examples, and that the report shows an effect."""
    assert_trains(straight_run(technique))


def check_neutral_is_trainer(technique: Technique, directory: Path) -> None:
    """Check that training with the neutral values is bit-identical to Trainer's."""
    if technique.neutral is None:
        return
    neutral = dataclasses.replace(technique, **technique.neutral)  # type: ignore[type-var]
    losses, weights = plain_run(technique.modality)
    hosted = tiny_trainer([neutral], directory)
    averaging = hosted.accel.roster.owner("averaging") is not None
    hosted.train()
    assert losses_of(hosted) == list(losses), f"{neutral!r}: the losses are not Trainer's"
    if not averaging:
        assert largest_difference(weights_of(hosted), weights) == 0.0


def check_resumes_bit_exactly(technique: Technique, directory: Path) -> None:
    """Check that a run resumed in the middle of an epoch equals the uninterrupted run, bit for bit."""
    straight = straight_run(technique)
    assert_resumes(straight, directory, straight.steps // 2 + 1)


def check_resumes_early_and_late(technique: Technique, directory: Path) -> None:
    """Check the same after the first third, which is the end of an epoch, and before the last step."""
    straight = straight_run(technique)
    for step in sorted({max(straight.steps // 3, 1), straight.steps - 1}):
        assert_resumes(straight, directory / str(step), step)


def check_trains_twice(technique: Technique, directory: Path) -> None:
    """Check that the same instance gives the same run a second time, even without checkpoints."""
    first = straight_run(technique)
    second = tiny_trainer([first.technique], directory, **SETTINGS)
    second.train()
    assert losses_of(second) == first.losses, f"{first.technique!r}: the second run differs from the first"
    assert largest_difference(weights_of(second), first.weights) == 0.0
    assert second.receipt.techniques[0]["report"] == first.report


def check_evaluates_what_it_returns(technique: Technique, directory: Path) -> None:
    """Check that the last evaluation, the returned model and the saved model agree."""
    run = straight_run(technique)
    assert_evaluates_what_it_returns(run)
    assert_saves_what_it_returns(run, directory)


def check_micro_batch_invariant(technique: Technique, directory: Path) -> None:
    """Check that the size of a micro-batch changes only rounding (float64, no dropout)."""
    runs = []
    exact: dict[str, Any] = {"dropout": 0.0, "dtype": torch.float64, "num_train_epochs": 2}
    for size in (8, 3):
        trainer = tiny_trainer([again(technique)], directory, micro_batch_size=size, **exact)
        trainer.train()
        runs.append(weights_of(trainer))
    difference = largest_difference(*runs)
    assert difference < 1e-9, f"{technique!r}: weights differ by {difference} between micro-batches of 8 and of 3"


def check_leaves_the_model_as_found(technique: Technique, directory: Path) -> None:
    """Check that training restores ``requires_grad``, hooks, train/eval flags and forward methods."""
    before, after = straight_run(technique).outfits
    assert after == before, f"{technique!r}: it left the model changed"


def check_every_option_matters(technique: Technique, directory: Path) -> None:
    """Check that another value of any field changes the run or its report."""
    straight = straight_run(technique)
    for name, other in other_values(technique):
        varied = dataclasses.replace(technique, **{name: other})  # type: ignore[type-var]
        trainer = tiny_trainer([varied], directory, **SETTINGS)
        trainer.train()
        same = losses_of(trainer) == straight.losses and trainer.receipt.techniques[0]["report"] == straight.report
        same = same and largest_difference(weights_of(trainer), straight.weights) == 0.0
        assert not same, f"{type(technique).__name__}: {name}={other!r} changes nothing"


def other_values(technique: Technique) -> Iterator[tuple[str, Any]]:
    """Yield each field with another value within the bounds."""
    hints = field_hints(type(technique))
    for field in dataclasses.fields(technique):  # type: ignore[arg-type]
        if field.name in technique.variations:
            yield field.name, technique.variations[field.name]
            continue
        value, hint = getattr(technique, field.name), hints[field.name]
        options = [option for option in get_args(hint) if isinstance(option, str)]
        candidates: list[Any] = [o for o in options if o != value]
        if isinstance(value, bool):
            candidates = [not value]
        elif isinstance(value, int):
            candidates = [value * 2, value // 2, value + 1]
        elif isinstance(value, float):
            candidates = [value / 2, value * 2, value + 0.5, value + 0.25]
        for candidate in candidates:
            if candidate != value:
                try:
                    dataclasses.replace(technique, **{field.name: candidate})  # type: ignore[type-var]
                except ValueError:
                    continue
                yield field.name, candidate
                break
        else:
            raise AssertionError(f"{type(technique).__name__}.{field.name}: give another value in `variations`")


CHECKS: tuple[Callable[[Technique, Path], None], ...] = (
    check_stores_only_hyperparameters,
    check_names_bad_values,
    check_trains,
    check_neutral_is_trainer,
    check_resumes_bit_exactly,
    check_resumes_early_and_late,
    check_trains_twice,
    check_evaluates_what_it_returns,
    check_micro_batch_invariant,
    check_leaves_the_model_as_found,
    check_every_option_matters,
)
"""All checks of one technique on one process, in float32."""
