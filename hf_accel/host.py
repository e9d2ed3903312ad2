"""What we rely on of the host, and what we say of its arguments.

`transformers.Trainer` is not ours.  The private names that are overridden or called are listed here with their
parameters and compared when a trainer is built; every field of ``TrainingArguments`` is said to be honoured,
re-interpreted or refused while batches come from the stream.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import transformers
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_accel.technique import STREAM, Technique

if TYPE_CHECKING:
    from hf_accel.trainer import AccelTrainerMixin

TESTED = ("5.17.0", "5.23.0")
"""The oldest and the newest transformers that the tests ran with."""

RELIED_ON = {
    "_finalize_training": "trial num_train_samples start_time",
    "_get_collator_with_removed_columns": "data_collator description",
    "_get_grad_norm": "model grad_norm",
    "_get_learning_rate": "",
    "_get_num_items_in_batch": "batch_samples device",
    "_get_output_dir": "trial",
    "_hp_search_setup": "trial",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_move_model_to_device": "model device",
    "_prepare_inputs": "inputs",
    "_push_from_checkpoint": "checkpoint_folder",
    "_remove_unused_columns": "dataset description",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_track_num_input_tokens": "inputs",
    "call_model_init": "trial",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_accelerator_and_postprocess": "",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_total_train_batch_size": "args",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "save_model": "output_dir _internal_call",
    "set_initial_training_values": "args dataloader",
    "training_step": "model inputs num_items_in_batch",
}
"""Trainer's methods that we override or call, with their parameters."""

NEEDS_EXAMPLE_LOSSES = frozenset(
    {"loss_head", "example_weights", "token_weights", "extra_loss", "observe", "step_select"}
)
"""Hooks and slots that cannot be answered without the loss of each example."""

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
    return "honoured", ""


def check_signatures() -> None:
    """Raise where this transformers is not one that we know."""
    for name, parameters in RELIED_ON.items():
        method = getattr(Trainer, name, None)
        found = None if method is None else [p for p in inspect.signature(method).parameters if p != "self"]
        if found != parameters.split():
            raise ImportError(
                f"transformers {transformers.__version__}: Trainer.{name} is not as hf_accel knows it. "
                f"Install a tested version ({TESTED[0]} to {TESTED[1]})."
            )


def refuse_two_budgets(args: TrainingArguments, owner: Technique) -> None:
    """A budget and ``max_steps`` say the same thing twice."""
    if args.max_steps > 0:
        raise ValueError(f"max_steps={args.max_steps}: {owner!r} says already when the run ends. Give one of the two.")


def refuse_schedules(args: TrainingArguments, owner: Technique | None) -> None:
    """Schedules that do not follow progress, and two schedules at once."""
    kind = SchedulerType(args.lr_scheduler_type)
    if kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise ValueError(f"lr_scheduler_type={kind.value!r}: it follows the metric, not progress. Choose another.")
    default = TrainingArguments.__dataclass_fields__
    said = [
        name
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
        if getattr(args, name) not in (default[name].default, None, {}, 0, SchedulerType.LINEAR)
    ]
    if owner is not None and said:
        raise ValueError(
            f"{said[0]}={getattr(args, said[0])!r}: {owner!r} is the schedule, its warm-up included. Say it in one."
        )


def refuse_quantised(model: Any) -> None:
    """Quantised weights that cannot be trained, or without adapters that can."""
    quantizer = model.hf_quantizer
    if not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method.value
        raise ValueError(
            f"model: {method} weights of this kind cannot be trained. Load them with bitsandbytes in 4 bits."
        )
    if not hasattr(model, "peft_config") and not getattr(quantizer, "is_qat_trainable", False):
        raise ValueError(
            f"model: {type(model).__name__} has quantised weights, which are not trained, and no adapters, which "
            "would be. Add them, with a technique or with peft."
        )


def refuse_two_optimizers(args: TrainingArguments, owner: Technique | None) -> None:
    """A technique is the optimizer, and the arguments name another one than AdamW, which stands there by itself."""
    default = OptimizerNames(args.optim) in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    if owner is not None and not (default and args.optim_args is None):
        said = f"optim_args={args.optim_args!r}" if default else f"optim={OptimizerNames(args.optim).value!r}"
        raise ValueError(f"{said}: {owner!r} is the optimizer. Say it in one.")


def refuse_stream_arguments(args: TrainingArguments) -> None:
    """Arguments that the stream cannot honour, each by its name."""
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r}: the techniques' stream orders the examples. "
            "Use a technique that owns the slot 'order', such as LengthGrouped()."
        )
    accelerator_config: Any = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator_config, name):
            raise ValueError(f"accelerator_config.{name}=True: every rank reads its own part of a step. Leave it out.")
    if not accelerator_config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config.use_seedable_sampler=False: the order is keyed by seed and epoch. Leave it out."
        )
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True: the techniques' stream resumes at no cost. Leave it out.")
    if args.parallelism_config is not None:
        raise ValueError("parallelism_config: the techniques' stream knows data parallelism only. Leave it out.")
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: nn.DataParallel is not supported. Start the script (or -m hf_accel.cli) "
            f"with torchrun --nproc_per_node {args.n_gpu}, or take one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def refuse_stream_hosts(trainer: AccelTrainerMixin) -> None:
    """Trainers and data that a stream cannot serve."""
    dataset = trainer.train_dataset
    if isinstance(dataset, IterableDataset):
        _refuse_on_iterables(trainer, dataset)
    elif dataset is not None and not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"train_dataset ({type(dataset).__name__}): it has neither an index nor is it an IterableDataset. "
            "Give a data set with __len__ and __getitem__, or one of these."
        )
    for name in ("get_train_dataloader", "_get_train_sampler"):
        owner = next(cls for cls in _foreign_classes(trainer) if name in vars(cls))
        if owner is not Trainer:
            replacing = ", ".join(repr(t) for t in trainer.techniques if t.answers() & STREAM)
            raise ValueError(
                f"{owner.__name__}.{name}: it makes batches of its own, which {replacing or 'micro_batch_size'} would "
                "replace. Leave that out."
            )


def _refuse_on_iterables(trainer: AccelTrainerMixin, dataset: Any) -> None:
    """What cannot be had of data that is only iterated over."""
    kind = type(dataset).__name__
    for technique in trainer.techniques:
        if technique.answers() & {"select", "order"}:
            raise ValueError(
                f"{technique!r}: it chooses examples by their index, which train_dataset ({kind}) lacks. "
                "Give a data set with __len__ and __getitem__."
            )
    if trainer.args.world_size > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            f"train_dataset ({kind}): it was split by node, and every rank takes its share of a step itself. "
            "Give the whole."
        )
    if trainer.args.world_size > 1 and trainer.requested_micro_batch_size == "auto":
        raise ValueError(
            f"micro_batch_size='auto': which example of train_dataset ({kind}) is the longest is not known. "
            "Give a number."
        )


def refuse_unknown_epochs(owner: Technique, dataset: Any) -> None:
    """A budget in epochs of unknown length has no progress within them."""
    if "epochs" in owner.budget():
        raise ValueError(
            f"{owner!r}: how long an epoch of train_dataset ({type(dataset).__name__}) is, is not known. "
            "Give a budget in steps, samples, tokens or time."
        )


def refuse_own_losses(trainer: AccelTrainerMixin) -> None:
    """A trainer whose loss is not its model's has no loss of an example that we could know."""
    owner = next(cls for cls in _foreign_classes(trainer) if "compute_loss" in vars(cls))
    if owner is not Trainer:
        raise ValueError(
            f"{owner.__name__} computes a loss of its own. Give example_loss_func=, a function (outputs, inputs) -> "
            "losses_B; or hf_accel.losses.head_of(model), where it is the loss that the model has, too."
        )


def arguments_kind(trainer: AccelTrainerMixin) -> type[TrainingArguments]:
    """The class of the arguments that the constructor of a trainer asks for."""
    owner: Any = next(cls for cls in _foreign_classes(trainer) if "__init__" in vars(cls))
    try:
        parameter = inspect.signature(owner.__init__, eval_str=True).parameters.get("args")
    except NameError:  # of what is imported for type checkers alone
        return TrainingArguments
    hints = () if parameter is None else (parameter.annotation, *get_args(parameter.annotation))
    return next((h for h in hints if isinstance(h, type) and issubclass(h, TrainingArguments)), TrainingArguments)


def _foreign_classes(trainer: AccelTrainerMixin) -> list[type]:
    """The trainer's own classes, without ours."""
    return [cls for cls in type(trainer).__mro__ if not cls.__module__.startswith("hf_accel.")]


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


def refuse_absolute_warmup(
    args: TrainingArguments, steps: int | None, limits: Mapping[str, float], owner: Technique | None
) -> None:
    """Warm-up in steps has no meaning where the number of steps is not known."""
    if steps is None and owner is None and args.warmup_steps >= 1:
        raise ValueError(
            f"warmup_steps={args.warmup_steps}: the budget is in {', '.join(limits)}. Give a fraction, such as 0.05."
        )


def accelerator_differs(old: TrainingArguments, new: TrainingArguments) -> bool:
    """Whether a technique changed an argument that the accelerator was built from."""
    names = [
        f.name
        for f in dataclasses.fields(new)
        if f.name.startswith("ddp_") or f.name in ("bf16", "fp16", "torch_compile", "fsdp", "fsdp_config", "deepspeed")
    ]
    return any(getattr(old, name) != getattr(new, name) for name in names)


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
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
    changed = {name: getattr(value, "value", value) for name, value in said_arguments(args).items()}  # of enumerations
    plain = bool | int | float | str | dict | list
    return {name: value for name, value in changed.items() if name not in private and isinstance(value, plain)}


def said_arguments(args: TrainingArguments) -> dict[str, Any]:
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


def extend_model_card(path: Path, trainer: AccelTrainerMixin) -> None:
    """Name the techniques, the budget and the receipt in a model card."""
    lines = ["", "### Training with hf_accel", ""]
    lines += [f"- `{technique!r}`" for technique in trainer.techniques] or ["- no technique"]
    if trainer.receipt is not None:
        receipt = trainer.receipt
        budget = ", ".join(f"{amount:g} {unit}" for unit, amount in receipt.budget.items())
        lines += [
            "",
            f"Budget: {budget}. Spent: {receipt.wall_seconds:.1f} s, {receipt.steps} steps, {receipt.samples:.0f} "
            "samples. See `receipt.json` and `recipe.yaml`.",
        ]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
