"""Check one technique on one process."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types as at
import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_accel.bounds import field_hints
from hf_accel.technique import Technique
from hf_accel.testing.probes import PROBES, again, largest_difference, losses_of, tiny_llama, tiny_trainer, weights_of

__all__ = [
    "CHECKS",
    "MODE_CHECKS",
    "bad_values",
    "check_bf16_autocast",
    "check_bf16_weights",
    "check_checkpointing",
    "check_evaluates_what_it_returns",
    "check_every_option_matters",
    "check_leaves_the_model_as_found",
    "check_micro_batch_invariant",
    "check_names_bad_values",
    "check_neutral_is_trainer",
    "check_reentrant_checkpointing",
    "check_resumes_bit_exactly",
    "check_resumes_early_and_late",
    "check_stores_only_hyperparameters",
    "check_technique",
    "check_tied_head",
    "check_trains",
    "check_trains_twice",
    "other_values",
]

WEIGHT_DECAY = 0.1  # of most runs, for techniques that change it

AT_END: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 100}
"""Arguments to evaluate after the last step, and before it if a technique needs to."""

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")  # the older name
    if name in TrainingArguments.__dataclass_fields__
)


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


@dataclasses.dataclass(frozen=True)
class Run:
    """An uninterrupted run of a technique, with or without checkpoints."""

    technique: Technique  # the instance that trained
    directory: Path
    steps: int
    losses: list[float]
    weights: dict[str, Tensor]
    samples: int
    progress: float
    report: dict[str, Any]
    evaluated: tuple[float, float | None, float]  # losses before training, last logged, and of the returned model
    outfits: tuple[list[Any], list[Any]]  # see `_outfit`, before and after training


def _run(technique: Technique, directory: Path, **settings: Any) -> Run:
    """Evaluate, train, evaluate and save; the first evaluation draws nothing from the global generator."""
    fresh = again(technique)
    trainer = tiny_trainer([fresh], directory, **settings)
    before = _outfit(trainer.model)
    with torch.random.fork_rng(devices=[]):
        initial = trainer.evaluate()["eval_loss"]
    trainer.state.log_history.clear()
    trainer.train()
    weights, after = weights_of(trainer), _outfit(trainer.model)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    returned = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(directory / "saved"))
    return Run(
        technique=fresh,
        directory=directory,
        steps=trainer.state.global_step,
        losses=losses_of(trainer),
        weights=weights,
        samples=trainer.receipt.samples,
        progress=trainer.clock.progress,
        report=trainer.receipt.techniques[0]["report"],
        evaluated=(initial, logged[-1] if logged else None, returned),
        outfits=(before, after),
    )


_straight_runs: dict[tuple[type[Technique], str], Run] = {}  # the latest only: one technique is checked at a time


def _straight(technique: Technique) -> Run:
    """Return a copy of the run that checks of a technique compare with, which is made once."""
    key = type(technique), repr(technique)
    if key not in _straight_runs:
        _straight_runs.clear()
        directory = Path(tempfile.mkdtemp(prefix="contract-"))
        try:
            run = _run(technique, directory, save_strategy="steps", save_steps=1, weight_decay=WEIGHT_DECAY)
        except BaseException:
            shutil.rmtree(directory)
            raise
        weakref.finalize(run, shutil.rmtree, directory, ignore_errors=True)
        _straight_runs[key] = run
    run = _straight_runs[key]
    weights = {name: value.clone() for name, value in run.weights.items()}
    return dataclasses.replace(run, losses=list(run.losses), weights=weights, report=copy.deepcopy(run.report))


@functools.cache
def _plain(modality: str) -> tuple[tuple[float, ...], dict[str, Tensor]]:
    """Return losses and weights of a plain Trainer."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = tiny_trainer([], directory, trainer_class=Trainer, modality=modality)
        trainer.train()
    return tuple(losses_of(trainer)), weights_of(trainer)


def _outfit(model: torch.nn.Module) -> list[Any]:
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ]
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    modes = {module.training for module in model.modules()}
    return [flags, hooks, forwards, len(modes)]  # an evaluation leaves all of the model in its mode


def check_trains(technique: Technique, directory: Path) -> None:
    """Check that training lowers the loss on other examples, and that the report shows an effect."""
    _assert_trains(_straight(technique))


def _assert_trains(run: Run) -> None:
    before, _, after = run.evaluated
    assert after < before, f"{run.technique!r}: the loss on other examples went from {before} to {after}"
    assert run.technique.took_effect(run.report), f"{run.technique!r}: no effect in its report {run.report}"
    assert run.progress == 1.0


def check_neutral_is_trainer(technique: Technique, directory: Path) -> None:
    """Check that training with the neutral values is bit-identical to Trainer's."""
    if technique.neutral is None:
        return
    neutral = dataclasses.replace(technique, **technique.neutral)  # type: ignore[type-var]
    losses, weights = _plain(technique.modality)
    hosted = tiny_trainer([neutral], directory)
    averaging = hosted.accel.roster.owner("averaging") is not None
    hosted.train()
    assert losses_of(hosted) == list(losses), f"{neutral!r}: the losses are not Trainer's"
    if not averaging:
        assert largest_difference(weights_of(hosted), weights) == 0.0


def check_resumes_bit_exactly(technique: Technique, directory: Path) -> None:
    """Check that a run resumed in the middle of an epoch equals the uninterrupted run, bit for bit."""
    straight = _straight(technique)
    _assert_resumes(straight, directory, straight.steps // 2 + 1, weight_decay=WEIGHT_DECAY)


def check_resumes_early_and_late(technique: Technique, directory: Path) -> None:
    """Check the same after the first third, which is the end of an epoch, and before the last step."""
    straight = _straight(technique)
    for step in sorted({max(straight.steps // 3, 1), straight.steps - 1}):
        _assert_resumes(straight, directory / str(step), step, weight_decay=WEIGHT_DECAY)


def _assert_resumes(straight: Run, directory: Path, step: int, **settings: Any) -> None:
    technique = straight.technique
    resumed = tiny_trainer([again(technique)], directory, **settings)
    resumed.train(resume_from_checkpoint=str(straight.directory / f"checkpoint-{step}"))
    assert losses_of(resumed) == straight.losses, f"{technique!r}: other losses after resuming at {step}"
    difference = largest_difference(weights_of(resumed), straight.weights)
    assert difference == 0.0, f"{technique!r}: weights differ by {difference} after resuming at step {step}"
    assert resumed.receipt.samples == straight.samples
    assert resumed.receipt.techniques[0]["report"] == straight.report


def check_trains_twice(technique: Technique, directory: Path) -> None:
    """Check that the same instance gives the same run a second time, even without checkpoints."""
    first = _straight(technique)
    second = tiny_trainer([first.technique], directory, weight_decay=WEIGHT_DECAY)
    second.train()
    assert losses_of(second) == first.losses, f"{first.technique!r}: the second run differs from the first"
    assert largest_difference(weights_of(second), first.weights) == 0.0
    assert second.receipt.techniques[0]["report"] == first.report


def check_evaluates_what_it_returns(technique: Technique, directory: Path) -> None:
    """Check that the last evaluation, the returned model and the saved model agree."""
    run = _run(technique, directory, **AT_END)
    _assert_evaluates_what_it_returns(run)
    _assert_saves_what_it_returns(run, directory)


def _assert_evaluates_what_it_returns(run: Run) -> None:
    _, logged, returned = run.evaluated
    assert logged is not None, f"{run.technique!r}: no evaluation was logged"
    assert math.isclose(logged, returned, rel_tol=1e-6), f"{run.technique!r}: evaluated {logged}, returned {returned}"


def _assert_saves_what_it_returns(
    run: Run, directory: Path, base: Callable[[], Any] | None = None, **settings: Any
) -> None:
    technique, (_, _, returned) = run.technique, run.evaluated
    saved = PROBES[technique.modality].model(0.0, torch.float32) if base is None else base()
    if (run.directory / "saved" / "adapter_config.json").is_file():
        from peft import PeftModel

        saved = PeftModel.from_pretrained(saved, run.directory / "saved")  # adapters are saved without their model
    else:
        saved = type(saved).from_pretrained(run.directory / "saved")
    plain = tiny_trainer([], directory, trainer_class=Trainer, model=saved, modality=technique.modality, **settings)
    reloaded = plain.evaluate()["eval_loss"]
    assert math.isclose(reloaded, returned, rel_tol=1e-6), f"{technique!r}: returned {returned}, saved {reloaded}"


def check_micro_batch_invariant(technique: Technique, directory: Path) -> None:
    """Check that the size of a micro-batch changes only rounding (float64, no dropout)."""
    runs = []
    for size in (8, 3):
        trainer = tiny_trainer([again(technique)], directory, dropout=0.0, dtype=torch.float64, micro_batch_size=size)
        trainer.train()
        runs.append(weights_of(trainer))
    difference = largest_difference(*runs)
    assert difference < 1e-9, f"{technique!r}: weights differ by {difference} between micro-batches of 8 and of 3"


def check_leaves_the_model_as_found(technique: Technique, directory: Path) -> None:
    """Check that training restores ``requires_grad``, hooks, train/eval flags and forward methods."""
    before, after = _straight(technique).outfits
    assert after == before, f"{technique!r}: it left the model changed"


def check_every_option_matters(technique: Technique, directory: Path) -> None:
    """Check that another value of any field changes the run or its report."""
    straight = _straight(technique)
    for name, other in other_values(technique):
        varied = dataclasses.replace(technique, **{name: other})  # type: ignore[type-var]
        trainer = tiny_trainer([varied], directory, weight_decay=WEIGHT_DECAY)
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


# Modes in which people train; float32 is the reference ----------------------------------------------------------------


def check_bf16_autocast(technique: Technique, directory: Path) -> None:
    """Check that with ``bf16=True`` it trains, resumes bit for bit, and evaluates the model that it returns."""
    # LoRA multiplies the rate by ten; at a higher rate, rounding would decide whether it learns.
    _check_mode(technique, directory, bf16=True, learning_rate=1e-3)


def check_bf16_weights(technique: Technique, directory: Path) -> None:
    """Check the same with weights of bfloat16."""
    probe = PROBES[technique.modality]

    def model() -> torch.nn.Module:
        made = probe.model(0.1, torch.float32)
        for parameter in made.parameters():
            parameter.data = parameter.data.bfloat16()
        return made  # buffers stay, as in `from_pretrained`

    _check_mode(technique, directory, model, dtype=torch.bfloat16)


def check_checkpointing(technique: Technique, directory: Path) -> None:
    """Check that activation checkpointing does not change the run, bit for bit, and that it resumes."""
    _check_checkpointing(technique, directory, use_reentrant=False)


def check_reentrant_checkpointing(technique: Technique, directory: Path) -> None:
    """Check the same with the older kind of checkpointing, ``use_reentrant=True``."""
    _check_checkpointing(technique, directory, use_reentrant=True)


def check_tied_head(technique: Technique, directory: Path) -> None:
    """Check the same as in bfloat16, in float32 and with a head that shares the weight of the embeddings."""
    if technique.modality == "text":  # the other models have no such head or are tied already
        _check_mode(technique, directory, model=functools.partial(tiny_llama, tied=True))


def _check_mode(
    technique: Technique, directory: Path, model: Callable[[], torch.nn.Module] | None = None, **settings: Any
) -> None:
    run = _run_in_mode(technique, directory, model, **AT_END, **settings)
    _assert_evaluates_what_it_returns(run)


def _run_in_mode(
    technique: Technique, directory: Path, model: Callable[[], torch.nn.Module] | None = None, **settings: Any
) -> Run:
    def made() -> dict[str, Any]:
        return settings if model is None else settings | {"model": model()}

    run = _run(technique, directory / "straight", save_strategy="steps", save_steps=4, **made())
    _assert_trains(run)
    steps = range(4, run.steps, 4)
    _assert_resumes(run, directory / "resumed", steps[len(steps) // 2], **made())
    _assert_saves_what_it_returns(run, directory, model, **settings)
    return run


def _check_checkpointing(technique: Technique, directory: Path, use_reentrant: bool) -> None:
    if not PROBES[technique.modality].model(0.0, torch.float32).supports_gradient_checkpointing:
        return
    settings = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
    run, without = _run_in_mode(technique, directory, weight_decay=WEIGHT_DECAY, **settings), _straight(technique)
    assert run.losses == without.losses, f"{technique!r}: activation checkpointing changes the losses"
    difference = largest_difference(run.weights, without.weights)
    assert difference == 0.0, f"{technique!r}: weights differ by {difference} with activation checkpointing"


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

MODE_CHECKS: tuple[Callable[[Technique, Path], None], ...] = (
    check_bf16_autocast,
    check_bf16_weights,
    check_checkpointing,
    check_reentrant_checkpointing,
    check_tied_head,
)
"""Checks of one technique in the modes in which people train."""


def check_technique(technique: Technique, directory: str | Path) -> None:
    """Run all checks; those in ``expected_failed_checks`` must fail."""
    for check in (*CHECKS, *MODE_CHECKS):
        place = Path(directory, check.__name__)
        place.mkdir(parents=True, exist_ok=True)
        if (reason := technique.expected_failed_checks.get(check.__name__)) is None:
            check(technique, place)
            continue
        try:
            check(technique, place)
        except Exception:
            continue
        raise AssertionError(f"{technique!r} passes {check.__name__}, which it declares to fail ({reason})")
