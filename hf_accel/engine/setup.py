"""Prepare the arguments, model, callbacks and loss of a trainer for its techniques."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import has_length

from hf_accel import host as hosts
from hf_accel import losses
from hf_accel.engine.callbacks import SigtermCallback, charge_events
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.engine.run_view import RunView
from hf_accel.host.view import TrainerView
from hf_accel.technique import Technique


@dataclass
class Options:
    """Options of a trainer beside its techniques; see `AccelTrainerMixin`."""

    micro_batch_size: int | Literal["auto"] | None = None
    allow_changes: bool = False
    async_checkpoints: bool = False
    example_loss_func: Callable | losses.Head | None = None


def show_run(techniques: Sequence[Technique], view: RunView) -> None:
    """Show a run to its techniques; refuse those that are training in another trainer."""
    for technique in techniques:
        other = technique.run_
        if other is not None and other is not view and getattr(other, "is_in_train", False):
            raise ValueError(f"{technique!r} is training in another trainer. Make a new instance.")
    for technique in techniques:
        technique.run_ = view  # type: ignore[misc]


def hide_run(techniques: Sequence[Technique]) -> None:
    """Undo `show_run`, so that another trainer may take the techniques."""
    for technique in techniques:
        vars(technique).pop("run_", None)


def prepared_args(args: TrainingArguments, dataset: Any, roster: Roster, options: Options) -> TrainingArguments:
    """Return the arguments, a copy, changed as techniques and the stream need."""
    for technique in roster.with_hook("prepare_args"):
        args = technique.prepare_args(args)
    if (owner := roster.owner("budget")) is not None:
        hosts.refuse_two_budgets(args, owner)
        if dataset is not None and not has_length(dataset):
            hosts.refuse_unknown_epochs(owner, dataset)
            args.max_steps = sys.maxsize  # Trainer needs a number if the data has no length
    hosts.refuse_two_optimizers(args, roster.owner("optimizer"))
    if roster.paced:
        hosts.refuse_schedules(args, roster.owner("schedule"))
    if roster.streamed:
        hosts.refuse_stream_arguments(args)
        if args.auto_find_batch_size:
            if options.micro_batch_size not in (None, "auto"):
                raise ValueError(
                    f"auto_find_batch_size=True does not support micro_batch_size={options.micro_batch_size!r} because "
                    "it chooses that size itself. Set micro_batch_size=None."
                )
            options.micro_batch_size = "auto"
        args.auto_find_batch_size = False
    return args


def prepared_model(model: nn.Module, roster: Roster) -> nn.Module:
    """Return the model that the techniques make of a model."""
    for technique in roster.with_hook("prepare_model"):
        model = technique.prepare_model(model)
    return model


def replace_model(host: TrainerView, roster: Roster) -> None:
    """Replace the trainer's model by the prepared one; ``model_init`` makes its model later."""
    if host.model_init is not None or "prepare_model" not in roster.answered:
        return
    model = prepared_model(host.model, roster)
    if model is not host.model:
        host.model = host.model_wrapped = model
        host.callback_handler.model = model
        host.signature_columns = None
        if host.place_model_on_device:
            host.move_model_to_device(model, host.args.device)


def add_callbacks(host: TrainerView, ranks: Ranks, first: TrainerCallback, last: TrainerCallback) -> None:
    """Put our callbacks around the trainer's own, and replace its SIGTERM callback by one that saves whole steps."""
    handler = host.callback_handler
    if host.args.enable_jit_checkpoint:
        replaced: Any = host.pop_callback(JITCheckpointCallback)
        handler.callbacks.insert(0, SigtermCallback(ranks, replaced))
    charge_events(handler, host, first, last)


def find_head(
    host: TrainerView, roster: Roster, example_loss_func: Callable | losses.Head | None
) -> losses.Head | None:
    """Return the head, or None if it is unknown; raise if a technique needs it for losses of examples."""
    needing = [t for t in roster.techniques if t.implemented_hooks() & hosts.NEEDS_EXAMPLE_LOSSES]
    try:
        if example_loss_func is not None:
            head = losses.head_from(example_loss_func)
        elif host.compute_loss_func is not None:
            raise ValueError("compute_loss_func gives one loss for all examples. Pass example_loss_func= as well.")
        else:
            hosts.refuse_own_losses(host)
            head = losses.head_of(host.model)
    except ValueError as error:
        if needing:
            raise ValueError(f"{', '.join(map(repr, needing))} needs a loss for each example: {error}") from None
        return None
    for technique in roster.with_hook("loss_head"):
        head = technique.loss_head(head)
    return head
