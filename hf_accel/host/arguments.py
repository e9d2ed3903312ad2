"""What we rely on of the host, and what we say of its arguments.

`transformers.Trainer` is not ours.  The private names that are overridden or called are listed here with their
parameters and compared when a trainer is built; every field of ``TrainingArguments`` is said to be honored,
re-interpreted or refused while batches come from the stream.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, get_args

from transformers import TrainingArguments

from hf_accel.host.signatures import foreign_classes

REFUSED = {
    "train_sampling_strategy": "('group_by_length', 'batch_rebalance') the stream orders the examples itself",
    "accelerator_config": "(dispatch_batches, split_batches, no use_seedable_sampler) every rank reads its own part of "
    "a step, in an order keyed by seed and epoch; with or without even_batches no example comes twice",
    "ignore_data_skip": "the stream resumes where it stopped, at no cost",
    "lr_scheduler_type": "('reduce_lr_on_plateau', 'greedy') they follow the metric, not progress",
    "parallelism_config": "tensor, context and sequence parallelism are not supported",
}
"""Arguments of which some values are refused while batches come from the stream, with the reason."""

REINTERPRETED = {
    "per_device_train_batch_size": "with gradient_accumulation_steps, the examples of an update; the size of a forward "
    "pass is micro_batch_size",
    "gradient_accumulation_steps": "see per_device_train_batch_size; Trainer itself sees 1",
    "auto_find_batch_size": "means micro_batch_size='auto': the examples of an update stay",
    "logging_steps": "a fraction is one of progress",
    "eval_steps": "a fraction is one of progress",
    "save_steps": "a fraction is one of progress",
    "warmup_steps": "a fraction is one of progress",
    "lr_scheduler_type": "evaluated at progress",
    "num_train_epochs": "the budget where there is no other",
    "max_steps": "the budget where there is no other",
    "dataloader_in_order": "step batches always come in order",
    "enable_jit_checkpoint": "saves and stops at the end of the step in which SIGTERM came, not within it",
    "save_total_limit": "never deletes the last complete checkpoint",
}
"""Arguments that mean something else while batches come from the stream."""


def treatment(name: str) -> tuple[str, str]:
    """How a field of ``TrainingArguments`` is treated by the stream, and why."""
    if name in REFUSED:
        return "refused", "; else ".join(said[name] for said in (REFUSED, REINTERPRETED) if name in said)
    if name in REINTERPRETED:
        return "re-interpreted", REINTERPRETED[name]
    return "honored", ""


def arguments_kind(trainer: Any) -> type[TrainingArguments]:
    """The class of the arguments that the constructor of a trainer asks for."""
    owner: Any = next(cls for cls in foreign_classes(trainer) if "__init__" in vars(cls))
    try:
        parameter = inspect.signature(owner.__init__, eval_str=True).parameters.get("args")
    except NameError:  # of what is imported for type checkers alone
        return TrainingArguments
    hints = () if parameter is None else (parameter.annotation, *get_args(parameter.annotation))
    return next((h for h in hints if isinstance(h, type) and issubclass(h, TrainingArguments)), TrainingArguments)


def nominal_steps(limits: Mapping[str, float], steps_per_epoch: int, batch_size: int) -> int | None:
    """Updates that a budget is expected to buy; None for units in which this cannot be known beforehand."""
    known = []
    if "steps" in limits:
        known.append(limits["steps"])
    if "epochs" in limits:
        known.append(limits["epochs"] * steps_per_epoch)
    if "samples" in limits:
        known.append(limits["samples"] / batch_size)
    if not known or len(known) < len(limits):
        return None
    return max(math.ceil(min(known)), 1)


def accelerator_differs(old: TrainingArguments, new: TrainingArguments) -> bool:
    """Whether a technique changed an argument that the accelerator was built from."""
    names = [
        f.name
        for f in dataclasses.fields(new)
        if f.name.startswith("ddp_") or f.name in ("bf16", "fp16", "torch_compile", "fsdp", "fsdp_config", "deepspeed")
    ]
    return any(getattr(old, name) != getattr(new, name) for name in names)


def recorded_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The fields that differ from their defaults, as plain data; without paths, tokens and where to report."""
    private = {
        "output_dir",
        "hub_token",
        "hub_model_id",
        "run_name",
        "logging_dir",
        "report_to",
        "local_rank",
        "project",
    }
    changed = {
        name: getattr(value, "value", value) for name, value in non_default_arguments(args).items()
    }  # of enumerations
    plain = bool | int | float | str | dict | list
    return {name: value for name, value in changed.items() if name not in private and isinstance(value, plain)}


def non_default_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The fields that differ from their defaults; another instance is not asked, which would set up devices anew."""
    said = {}
    for field in dataclasses.fields(args):
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(args, field.name)
        same = getattr(value, "value", value) == getattr(usual, "value", usual)
        # What is empty and was empty before ``__post_init__`` says nothing.
        if field.init and not same and (value or usual):
            said[field.name] = value
    return said
