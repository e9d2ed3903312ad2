"""The checks of one technique in the modes in which people train; float32 is the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_accel.technique import Technique
from hf_accel.testing.probes import PROBES, largest_difference, tiny_llama
from hf_accel.testing.runs import (
    Run,
    assert_evaluates_what_it_returns,
    assert_resumes,
    assert_saves_what_it_returns,
    assert_trains,
    straight_run,
    train_and_evaluate,
)

__all__ = [
    "MODE_CHECKS",
    "check_bf16_autocast",
    "check_bf16_weights",
    "check_checkpointing",
    "check_reentrant_checkpointing",
    "check_tied_head",
]

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")  # the older name
    if name in TrainingArguments.__dataclass_fields__
)


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
    """Check that all of `check_bf16_autocast` holds in float32 with a head that shares the weight of the embeddings."""
    if technique.modality == "text":  # the other models have no such head or are tied already
        _check_mode(technique, directory, model=functools.partial(tiny_llama, tied=True))


def _check_mode(
    technique: Technique, directory: Path, model: Callable[[], torch.nn.Module] | None = None, **settings: Any
) -> Run:
    def made() -> dict[str, Any]:
        return settings if model is None else settings | {"model": model()}

    run = train_and_evaluate(technique, directory / "straight", save_strategy="steps", save_steps=4, **made())
    assert_trains(run)
    steps = range(4, run.steps, 4)
    assert_resumes(run, directory / "resumed", steps[len(steps) // 2], **made())
    assert_evaluates_what_it_returns(run)
    assert_saves_what_it_returns(run, directory, model, **settings)
    return run


def _check_checkpointing(technique: Technique, directory: Path, use_reentrant: bool) -> None:
    if not PROBES[technique.modality].model(0.0, torch.float32).supports_gradient_checkpointing:
        return
    settings = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
    run, without = _check_mode(technique, directory, **settings), straight_run(technique)
    assert run.losses == without.losses, f"{technique!r}: activation checkpointing changes the losses"
    difference = largest_difference(run.weights, without.weights)
    assert difference == 0.0, f"{technique!r}: weights differ by {difference} with activation checkpointing"


MODE_CHECKS: tuple[Callable[[Technique, Path], None], ...] = (
    check_bf16_autocast,
    check_bf16_weights,
    check_checkpointing,
    check_reentrant_checkpointing,
    check_tied_head,
)
"""Checks of one technique in the modes in which people train."""
