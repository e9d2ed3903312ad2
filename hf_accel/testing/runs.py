"""Runs that the checks compare, and what must hold of each."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_accel.technique import Technique
from hf_accel.testing.probes import PROBES, again, largest_difference, losses_of, tiny_trainer, weights_of

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 100}
"""Arguments of runs that are compared: decay, for techniques that change it, and an evaluation after the last step."""


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


def train_and_evaluate(technique: Technique, directory: Path, **settings: Any) -> Run:
    """Evaluate, train, evaluate and save; the first evaluation draws nothing from the global generator."""
    fresh = again(technique)
    trainer = tiny_trainer([fresh], directory, **(SETTINGS | settings))
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


def straight_run(technique: Technique) -> Run:
    """Return a copy of the run that checks of a technique compare with, which is made once."""
    key = type(technique), repr(technique)
    if key not in _straight_runs:
        _straight_runs.clear()
        directory = Path(tempfile.mkdtemp(prefix="contract-"))
        try:
            run = train_and_evaluate(technique, directory, save_strategy="steps", save_steps=1)
        except BaseException:
            shutil.rmtree(directory)
            raise
        weakref.finalize(run, shutil.rmtree, directory, ignore_errors=True)
        _straight_runs[key] = run
    run = _straight_runs[key]
    weights = {name: value.clone() for name, value in run.weights.items()}
    return dataclasses.replace(run, losses=list(run.losses), weights=weights, report=copy.deepcopy(run.report))


@functools.cache
def plain_run(modality: str) -> tuple[tuple[float, ...], dict[str, Tensor]]:
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


def assert_trains(run: Run) -> None:
    """Assert that training lowered the loss on other examples and took effect."""
    before, _, after = run.evaluated
    assert after < before, f"{run.technique!r}: the loss on other examples went from {before} to {after}"
    assert run.technique.took_effect(run.report), f"{run.technique!r}: no effect in its report {run.report}"
    assert run.progress == 1.0


def assert_resumes(straight: Run, directory: Path, step: int, **settings: Any) -> None:
    """Assert that a run resumed at a step is the uninterrupted one, bit for bit."""
    technique = straight.technique
    resumed = tiny_trainer([again(technique)], directory, **(SETTINGS | settings))
    resumed.train(resume_from_checkpoint=str(straight.directory / f"checkpoint-{step}"))
    assert losses_of(resumed) == straight.losses, f"{technique!r}: other losses after resuming at {step}"
    difference = largest_difference(weights_of(resumed), straight.weights)
    assert difference == 0.0, f"{technique!r}: weights differ by {difference} after resuming at step {step}"
    assert resumed.receipt.samples == straight.samples
    assert resumed.receipt.techniques[0]["report"] == straight.report


def assert_evaluates_what_it_returns(run: Run) -> None:
    """Assert that the last evaluation is that of the returned model."""
    _, logged, returned = run.evaluated
    assert logged is not None, f"{run.technique!r}: no evaluation was logged"
    assert math.isclose(logged, returned, rel_tol=1e-6), f"{run.technique!r}: evaluated {logged}, returned {returned}"


def assert_saves_what_it_returns(
    run: Run, directory: Path, base: Callable[[], Any] | None = None, **settings: Any
) -> None:
    """Assert that the saved model is the returned one; ``base`` makes the model of saved adapters."""
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
