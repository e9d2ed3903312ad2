"""Refuse arguments, trainers and data that the techniques do not support, each by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_accel.adapters import is_adapted
from hf_accel.host.view import TrainerView
from hf_accel.technique import STREAM, Technique

NEEDS_EXAMPLE_LOSSES = frozenset({"loss_head", "loss_weights", "extra_loss", "observe", "step_select"})
"""Hooks and slots that need the loss of each example."""


def refuse_two_budgets(args: TrainingArguments, owner: Technique) -> None:
    """Refuse ``max_steps`` beside a budget."""
    if args.max_steps > 0:
        raise ValueError(f"max_steps={args.max_steps}: {owner!r} limits the run already. Remove one of the two.")


def refuse_schedules(args: TrainingArguments, owner: Technique | None) -> None:
    """Refuse schedules that do not follow progress, and two schedules at once."""
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
            f"{said[0]}={getattr(args, said[0])!r}: {owner!r} is the schedule, including its warm-up. Remove one."
        )


def refuse_quantized(model: Any) -> None:
    """Refuse quantized weights that cannot be trained, and those without adapters."""
    quantizer = model.hf_quantizer
    if not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method.value
        raise ValueError(
            f"model: {method} weights of this kind cannot be trained. Load them with bitsandbytes in 4 bits."
        )
    if not is_adapted(model) and not getattr(quantizer, "is_qat_trainable", False):
        raise ValueError(
            f"model: {type(model).__name__} has quantized weights, which are frozen, and no adapters, so nothing is "
            "trainable. Add adapters with a technique or with peft."
        )


def refuse_two_optimizers(args: TrainingArguments, owner: Technique | None) -> None:
    """Refuse an optimizer in the arguments, except the default AdamW, if a technique is the optimizer."""
    default = OptimizerNames(args.optim) in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    if owner is not None and not (default and args.optim_args is None):
        said = f"optim_args={args.optim_args!r}" if default else f"optim={OptimizerNames(args.optim).value!r}"
        raise ValueError(f"{said}: {owner!r} is the optimizer. Remove one.")


def refuse_stream_arguments(args: TrainingArguments) -> None:
    """Refuse arguments that the stream does not support, each by its name."""
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r}: the techniques' stream orders the examples. "
            "Use a technique that owns the slot 'order', such as LengthGrouped()."
        )
    accelerator_config: Any = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator_config, name):
            raise ValueError(f"accelerator_config.{name}=True: every rank reads its own part of a step. Set False.")
    if not accelerator_config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config.use_seedable_sampler=False: the order is keyed by seed and epoch. Set True."
        )
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True: the techniques' stream resumes at no cost. Set False.")
    if args.parallelism_config is not None:
        raise ValueError("parallelism_config: the techniques' stream supports data parallelism only. Remove it.")
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: nn.DataParallel is not supported. Start the script (or -m hf_accel.cli) "
            f"with torchrun --nproc_per_node {args.n_gpu}, or use one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def refuse_stream_hosts(host: TrainerView, techniques: Sequence[Technique], micro_batch_size: Any) -> None:
    """Refuse trainers and data that the stream does not support."""
    dataset = host.train_dataset
    if isinstance(dataset, IterableDataset):
        _refuse_on_iterables(host.args, dataset, techniques, micro_batch_size)
    elif dataset is not None and not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"train_dataset ({type(dataset).__name__}) has no index and is not an IterableDataset. "
            "Give a data set with __len__ and __getitem__, or an IterableDataset."
        )
    for name in ("get_train_dataloader", "_get_train_sampler"):
        if (owner := host.overrides(name)) is not None:
            replacing = ", ".join(repr(t) for t in techniques if t.implemented_hooks() & STREAM)
            raise ValueError(
                f"{owner}.{name} makes its own batches, which {replacing or 'micro_batch_size'} would "
                f"replace. Remove {replacing or 'micro_batch_size'}."
            )


def _refuse_on_iterables(
    args: TrainingArguments, dataset: Any, techniques: Sequence[Technique], micro_batch_size: Any
) -> None:
    """Refuse techniques and settings that need an index."""
    kind = type(dataset).__name__
    for technique in techniques:
        if technique.implemented_hooks() & {"select", "order"}:
            raise ValueError(
                f"{technique!r} chooses examples by their index, which train_dataset ({kind}) lacks. "
                "Give a data set with __len__ and __getitem__."
            )
    if args.world_size > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            f"train_dataset ({kind}): it was split by node, and every rank takes its share of a step itself. "
            "Give the whole data set."
        )
    if args.world_size > 1 and micro_batch_size == "auto":
        raise ValueError(
            f"micro_batch_size='auto' does not support train_dataset ({kind}) because its longest example is unknown. "
            "Give a number."
        )


def refuse_unknown_epochs(owner: Technique, dataset: Any) -> None:
    """Refuse a budget in epochs of unknown length, which have no progress within them."""
    if "epochs" in owner.budget().amounts:
        raise ValueError(
            f"{owner!r}: train_dataset ({type(dataset).__name__}) has no length, so a budget in epochs cannot be "
            "planned. Use steps, samples, tokens or time."
        )


def refuse_own_losses(host: TrainerView) -> None:
    """Refuse trainers that override compute_loss, because their per-example losses are unknown."""
    if (owner := host.overrides("compute_loss")) is not None:
        raise ValueError(
            f"{owner} overrides compute_loss, so per-example losses are unknown. Pass example_loss_func=, a "
            "function (outputs, inputs) -> losses_B, or hf_accel.losses.head_of(model) if the loss is the model's own."
        )


def refuse_overrides(host: TrainerView, techniques: Sequence[Technique], *, streamed: bool) -> None:
    """Refuse custom methods that a technique or a budget would replace, or that could not read their inputs."""
    asked = {hook: technique for technique in reversed(techniques) for hook in technique.implemented_hooks()}
    for name, hooks in (("create_optimizer", ("optimizer", "parameter_rules")), ("create_scheduler", ("schedule",))):
        replacing = next((asked[hook] for hook in hooks if hook in asked), None)
        if replacing is not None and (owner := host.overrides(name)) is not None:
            raise ValueError(
                f"{replacing!r} does not support {owner}.{name} because the technique replaces that method. "
                "Remove one of the two."
            )
    if (budget := asked.get("budget")) is not None and not {"steps", "epochs"} >= set(budget.budget().amounts):
        given = host.lr_scheduler is not None and not host.created_lr_scheduler
        if given or host.overrides("create_scheduler") is not None:
            raise ValueError(
                f"{budget!r} does not support a custom learning-rate schedule because its number of steps is unknown. "
                "Set lr_scheduler_type or a technique that owns the schedule, or give the budget in steps."
            )
    if streamed and (owner := host.overrides_outside("training_step")) is not None:
        raise ValueError(
            f"{owner.__name__}.training_step does not support a step in several micro-batches because its inputs hold "
            f"all of them. Derive {owner.__name__} from Trainer and use accelerated({owner.__name__})."
        )


def refuse_absolute_warmup(
    args: TrainingArguments, steps: int | None, limits: Mapping[str, float], owner: Technique | None
) -> None:
    """Refuse warm-up in steps if the number of steps is unknown."""
    if steps is None and owner is None and args.warmup_steps >= 1:
        raise ValueError(
            f"warmup_steps={args.warmup_steps}: the budget is in {', '.join(limits)}. Give a fraction, such as 0.05."
        )


def refuse_uncounted(
    owner: Technique | None,
    limits: Mapping[str, float],
    *,
    samples: int | None,
    tokens: Sequence[Any],
    batches: Sequence[Any],
) -> None:
    """Refuse a budget in a unit that the batches do not tell, because it would never end."""
    for unit, unknown in (("samples", samples is None), ("tokens", None in tokens)):
        if unit in limits and unknown:
            raise ValueError(
                f"{owner!r} does not support {unit} here because a batch ({type(batches[0]).__name__}) does not tell "
                "how many it has. Give the budget in steps, epochs or time."
            )
