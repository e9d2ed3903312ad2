"""Say how each field of ``TrainingArguments`` is treated: honored, re-interpreted or refused.

This holds while batches come from the stream.
"""

from __future__ import annotations

import copy
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
    "a step, in an order keyed by seed and epoch. With or without even_batches no example comes twice",
    "ignore_data_skip": "the stream resumes where it stopped, at no cost",
    "lr_scheduler_type": "('reduce_lr_on_plateau', 'greedy') they follow the metric, not progress",
    "parallelism_config": "tensor, context and sequence parallelism are not supported",
}
"""Arguments with values that are refused while batches come from the stream, with the reason."""

REINTERPRETED = {
    "per_device_train_batch_size": "with gradient_accumulation_steps, the examples of an update; the size of a forward "
    "pass is micro_batch_size",
    "gradient_accumulation_steps": "see per_device_train_batch_size; Trainer itself sees 1",
    "auto_find_batch_size": "means micro_batch_size='auto'; the examples of an update stay the same",
    "logging_steps": "a fraction is a share of progress",
    "eval_steps": "a fraction is a share of progress",
    "save_steps": "a fraction is a share of progress",
    "warmup_steps": "a fraction is a share of progress",
    "lr_scheduler_type": "evaluated at progress",
    "num_train_epochs": "the budget if there is no other",
    "max_steps": "the budget if there is no other",
    "dataloader_in_order": "step batches always come in order",
    "enable_jit_checkpoint": "saves and stops at the end of the step that receives SIGTERM, not within it",
    "save_total_limit": "never deletes the last complete checkpoint",
}
"""Arguments with another meaning while batches come from the stream."""


def treatment(name: str) -> tuple[str, str]:
    """Return how the stream treats a field of ``TrainingArguments``, and why."""
    if name in REFUSED:
        return "refused", "; else ".join(table[name] for table in (REFUSED, REINTERPRETED) if name in table)
    if name in REINTERPRETED:
        return "re-interpreted", REINTERPRETED[name]
    return "honored", ""


def arguments_kind(trainer_class: type) -> type[TrainingArguments]:
    """Return the class of the arguments that a trainer's constructor asks for."""
    owner: Any = next(cls for cls in foreign_classes(trainer_class) if "__init__" in vars(cls))
    try:
        parameter = inspect.signature(owner.__init__, eval_str=True).parameters.get("args")
    except NameError:  # a name that only type checkers import
        return TrainingArguments
    hints = () if parameter is None else (parameter.annotation, *get_args(parameter.annotation))
    return next((h for h in hints if isinstance(h, type) and issubclass(h, TrainingArguments)), TrainingArguments)


def nominal_steps(limits: Mapping[str, float], steps_per_epoch: int, batch_size: int) -> int | None:
    """Return the expected number of updates of a budget; None for units that do not tell it in advance."""
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


def with_accumulation_steps(args: TrainingArguments) -> TrainingArguments:
    """Return a copy with accelerate's ``num_steps`` as ``gradient_accumulation_steps``, as Trainer has it."""
    args = copy.copy(args)
    args.accelerator_config = config = copy.copy(args.accelerator_config)
    kwargs = dict(config.gradient_accumulation_kwargs or {})  # type: ignore[union-attr]
    steps = kwargs.pop("num_steps", 1)  # Trainer leaves a 1 there
    if steps > 1 and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"The `AcceleratorConfig`'s `num_steps` is set but gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} is set as well. Remove one."
        )
    config.gradient_accumulation_kwargs = kwargs or None  # type: ignore[union-attr]
    args.gradient_accumulation_steps = max(steps, args.gradient_accumulation_steps)
    return args


def replace_arguments(trainer: Any, args: TrainingArguments) -> None:
    """Give a trainer that is built other arguments."""
    trainer.args = args
    trainer.create_accelerator_and_postprocess()
    trainer._train_batch_size = args.train_batch_size
    trainer.neftune_noise_alpha = args.neftune_noise_alpha


def accelerator_differs(old: TrainingArguments, new: TrainingArguments) -> bool:
    """Return whether a technique changed an argument that the accelerator depends on."""
    names = [
        f.name
        for f in dataclasses.fields(new)
        if f.name.startswith("ddp_") or f.name in ("bf16", "fp16", "torch_compile", "fsdp", "fsdp_config", "deepspeed")
    ]
    return any(getattr(old, name) != getattr(new, name) for name in names)


def recorded_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the fields that differ from their defaults as plain data, without paths, tokens and report targets."""
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
    # Enumerations are recorded by value.
    changed = {name: getattr(value, "value", value) for name, value in non_default_arguments(args).items()}
    plain = bool | int | float | str | dict | list
    return {name: value for name, value in changed.items() if name not in private and isinstance(value, plain)}


def non_default_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the fields that differ from their defaults.

    Another instance for comparison would set up devices again.
    """
    changed = {}
    for field in dataclasses.fields(args):
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(args, field.name)
        same = getattr(value, "value", value) == getattr(usual, "value", usual)
        # An empty value is no change if it was empty before ``__post_init__``.
        if field.init and not same and (value or usual):
            changed[field.name] = value
    return changed
