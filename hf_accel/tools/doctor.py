"""Find lost time of a training run and ways to save it, by profiling a short run of any trainer.

    findings = examine(trainer).findings    # before trainer.train(), which is impossible afterwards
    findings[0].what, findings[0].remedy, findings[0].saving

A finding names one cause of lost time, with the share of the whole run's time that a fix would save.  The share is
estimated from measurements on this machine.  Some causes cost time only on an accelerator, such as waiting for a number
in every step.  They have no share and come last.  Traps cost correctness instead of time.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from hf_accel.engine.memory import is_out_of_memory
from hf_accel.engine.reserve import probe_evaluation
from hf_accel.engine.short_run import Horizon
from hf_accel.losses import honors_num_items
from hf_accel.technique import Technique
from hf_accel.tools.watch import STEPS, WARM, Watch
from hf_accel.trainer import attach

NOTABLE = 0.05
"""Smallest share of the run that makes a finding."""
ENOUGH = 10
"""Number of evaluations that is enough to follow a run."""


@dataclass
class Finding:
    """A cause of lost time, or a trap.

    Args:
        what: Cause, with its figures.
        remedy: Advice.
        saving: Approximate share of the run's time that the remedy saves; None if this machine cannot tell.
    """

    what: str
    remedy: str
    saving: float | None = None


@dataclass
class Examination:
    """The results of a short run.

    Args:
        seconds: Seconds of a step by phase.
        run_seconds: Approximate seconds of the whole requested run; None if its length is unknown.
        findings: Findings, the most expensive first.
        traps: Settings with an unexpected result.
    """

    seconds: dict[str, float]
    run_seconds: float | None
    findings: list[Finding] = field(default_factory=list)
    traps: list[Finding] = field(default_factory=list)


def examine(
    trainer: Trainer, techniques: list[Technique] | None = None, limits: Mapping[str, float] | None = None
) -> Examination:
    """Train for a few steps, and report the costs.

    Args:
        trainer: Trainer before its `train()`; it cannot be used afterwards.
        techniques: Techniques to attach, as a recipe builds them.
        limits: Limits of the whole run by unit; None: its arguments tell its length.
    """
    args, steps, epochs = trainer.args, planned_steps(trainer), trainer.args.num_train_epochs
    logs_each_step = trainer.args.logging_strategy == IntervalStrategy.STEPS and trainer.args.logging_steps == 1
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        quiet(trainer, folder)
        attach(trainer, techniques=[Horizon({"steps": float(WARM + STEPS)}), *(techniques or []), watch])
        trainer.train()
        accel: Any = trainer.accel  # type: ignore[attr-defined]
        step, spent = statistics.median(watch.steps_), accel.meter.clock.spent
        if limits is not None:
            steps = limited_steps(limits, {unit: n / spent["steps"] for unit, n in spent.items()} | {"seconds": step})
            epochs = (steps or 0) * spent["epochs"] / spent["steps"]
        evaluations = planned_evaluations(args, steps, epochs)
        has_data = trainer.eval_dataset is not None and evaluations
        evaluation = probe_evaluation(accel.host, accel.meter.clock.now) if has_data else 0.0  # type: ignore[arg-type]
        longest = math.inf if limits is None else limits.get("seconds", math.inf)
        run_seconds = None if steps is None else min(steps * step + evaluations * evaluation, longest)
        waiting, seconds = communication(trainer), dict(watch.seconds_)
        if waiting:  # DDP sends gradients during the backward pass, whose end waits for the last ones
            seconds["backward"] = max(seconds.get("backward", 0.0) - waiting, 0.0)
            seconds["communication"] = waiting
        found = Examination(seconds, run_seconds, traps=traps(trainer))
        found.findings = [
            *_of_data(trainer, watch, step),
            *_of_padding(watch, step),
            *_of_communication(waiting, step),
            *_of_evaluation(evaluations, evaluation, run_seconds),
            *_of_checkpointing(trainer, step),
            *_of_waiting(watch, logs_each_step),
        ]
    found.findings.sort(key=lambda finding: -(finding.saving or 0.0))
    return found


def communication(trainer: Any, passes: int = 5) -> float:
    """Return the seconds that the exchange of gradients adds to a step of DDP, from passes with and without it.

    All ranks must call it together.  Return 0 for one process, and for FSDP and DeepSpeed, which cannot skip the
    exchange.  Return 0 also if a technique skips it.
    """
    wrapped, owner = trainer.model_wrapped, trainer.accel.roster.owner("synchronize")
    if not isinstance(wrapped, DistributedDataParallel) or (owner is not None and not owner.synchronize()):
        return 0.0
    inputs = trainer.accel.host.prepare_inputs(next(iter(Trainer.get_train_dataloader(trainer))))
    wrapped.train()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for exchanges in (True, False) * (passes + 1):
        dist.barrier()
        began = time.perf_counter()
        with contextlib.nullcontext() if exchanges else wrapped.no_sync():
            trainer.compute_loss(wrapped, dict(inputs)).backward()
        seconds[exchanges].append(_now() - began)
        wrapped.zero_grad()
    with_it, without = (statistics.median(seconds[exchanges][1:]) for exchanges in (True, False))
    return max(with_it - without, 0.0)


def quiet(trainer: Trainer, folder: str) -> None:
    """Turn off everything that a short run does not need."""
    args: Any = copy.copy(trainer.args)
    changes = {"output_dir": folder, "max_steps": -1, "eval_strategy": IntervalStrategy.NO, "push_to_hub": False}
    changes |= {"save_strategy": SaveStrategy.NO, "load_best_model_at_end": False, "eval_on_start": False}
    for name, value in changes.items():
        setattr(args, name, value)
    trainer.args = args
    # EarlyStoppingCallback needs evaluations, and the others report.
    for callback in (EarlyStoppingCallback, *INTEGRATION_TO_CALLBACK.values()):
        trainer.remove_callback(callback)


def planned_steps(trainer: Trainer) -> int | None:
    """Return the number of updates of the requested run; None if the data has no length."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    if trainer.train_dataset is None or not has_length(trainer.train_dataset):
        return None
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(math.ceil(args.num_train_epochs * math.ceil(len(trainer.train_dataset) / size)), 1)  # type: ignore[arg-type]


def limited_steps(limits: Mapping[str, float], each: Mapping[str, float]) -> int | None:
    """Return the number of updates within limits, given the cost of each by unit; None if no cost is known."""
    bought = [limit / each[unit] for unit, limit in limits.items() if each[unit]]
    return max(math.floor(min(bought) + 1e-6), 1) if bought else None


def planned_evaluations(args: TrainingArguments, steps: int | None, epochs: float) -> int:
    """Return the number of evaluations of a run; 0 if it is unknown."""
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return math.ceil(epochs)
    if args.eval_strategy == IntervalStrategy.STEPS and steps is not None:
        every = args.eval_steps or args.logging_steps
        return int(steps / (every if every >= 1 else max(every * steps, 1)))
    return 0


# Findings -------------------------------------------------------------------------------------------------------------


def _of_data(trainer: Trainer, watch: Watch, step: float) -> list[Finding]:
    waiting = watch.seconds_.get("data", 0.0)
    if waiting / step < NOTABLE:
        return []
    workers = trainer.args.dataloader_num_workers
    remedy = "Set dataloader_num_workers to 2 or more, so that workers make batches during the steps"
    if workers:
        remedy = f"Raise dataloader_num_workers, because {workers} workers are too slow"
    return [
        Finding(
            f"Data loading: a step waits {_ms(waiting)} of {_ms(step)} for its batch ({waiting / step:.0%}).",
            f"{remedy}, or move work of the data set and the collator to dataset.map.",
            waiting / step,
        )
    ]


def _of_padding(watch: Watch, step: float) -> list[Finding]:
    computing = sum(watch.seconds_.get(name, 0.0) for name in ("forward", "backward")) / step
    saving = watch.padding * computing
    if saving < NOTABLE:
        return []
    grouped = watch.padding_when_grouped
    return [
        Finding(
            f"Padding: {watch.padding:.0%} of the positions that the model computes are padding.",
            f"LengthGrouped() would leave about {grouped:.0%}, Packing() or PaddingFree() none. "
            "If the tokenizer pads to a fixed length, let the collator pad instead.",
            saving,
        )
    ]


def _of_communication(waiting: float, step: float) -> list[Finding]:
    if waiting / step < NOTABLE:
        return []
    return [
        Finding(
            f"Communication: a step waits {_ms(waiting)} of {_ms(step)} for the other ranks' gradients "
            f"({waiting / step:.0%}).",
            "Raise gradient_accumulation_steps to exchange less often. GradientCompression() sends half as much; "
            "LocalSGD() or DiLoCo() send weights every few steps.",
            waiting / step,
        )
    ]


def _of_evaluation(evaluations: int, seconds: float, run_seconds: float | None) -> list[Finding]:
    if not evaluations or run_seconds is None or evaluations * seconds / run_seconds < NOTABLE:
        return []
    share = evaluations * seconds / run_seconds
    what = f"Evaluation: {evaluations} of {_s(seconds)} each take {share:.0%} of the run."
    if evaluations > ENOUGH:
        remedy = f"Evaluate {ENOUGH} times (eval_strategy='steps', eval_steps={1 / ENOUGH:g}), or on fewer examples."
        return [Finding(what, remedy, share * (1 - ENOUGH / evaluations))]
    return [Finding(what, "Evaluate on fewer examples, or less often.", share / 2)]


def _of_checkpointing(trainer: Any, step: float) -> list[Finding]:
    model = trainer.model
    if not getattr(model, "is_gradient_checkpointing", False):
        return []
    batch = next(iter(Trainer.get_train_dataloader(trainer)))
    try:
        needed, with_it = _memory_and_seconds(trainer, batch)
        model.activation_checkpointing_disable()
        more, without = _memory_and_seconds(trainer, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return []
    free = free_memory(trainer.args.device)
    if more > 0.8 * free or without > with_it * (1 - NOTABLE):
        return []
    return [
        Finding(
            f"Activation checkpointing: it recomputes every forward pass to save {(more - needed) / 2**20:,.0f} MiB, "
            f"and {free / 2**30:,.1f} GiB are free.",
            "Turn off activation checkpointing.",
            (with_it - without) / max(step, with_it),
        )
    ]


def _memory_and_seconds(trainer: Any, batch: Any, passes: int = 3) -> tuple[int, float]:
    """Return the bytes that a forward pass keeps for its backward beside the weights, and the least seconds of both."""
    model, kept, seconds = trainer.model, 0, []
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    model.train()
    inputs = trainer.accel.host.prepare_inputs(batch)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    for number in range(passes):
        began = _now()
        hooks: Any = contextlib.nullcontext()
        if number == 0:
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks:
            loss = model(**inputs).loss
        loss.backward()
        seconds.append(_now() - began)
        model.zero_grad()
    return kept, min(seconds[1:])


def _now() -> float:
    """Return the time in seconds, after all work of the accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device, with those that its allocator caches, or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def _of_waiting(watch: Watch, logs_each_step: bool) -> list[Finding]:
    found = []
    lines = {line: count for line, count in watch.waits_.items() if line}
    if lines:
        worst = ", ".join(f"{line} ({count}x)" for line, count in sorted(lines.items(), key=lambda item: -item[1])[:3])
        found.append(
            Finding(
                f"Waiting for numbers: every step reads values of tensors (.item(), float(), print) in {worst}.",
                "Keep tensors and read them only for logging, because an accelerator idles meanwhile.",
            )
        )
    if logs_each_step:
        found.append(
            Finding(
                "Logging: logging_steps=1 reads the loss and reports it at every step.",
                "Set logging_steps to 10 or more, because an accelerator idles meanwhile.",
            )
        )
    return found


def traps(trainer: Any) -> list[Finding]:
    """Find settings of a trainer with an unexpected result."""
    args, model, found = trainer.args, trainer.model, []
    divided = args.gradient_accumulation_steps * args.world_size
    if divided > 1 and trainer.model_accepts_loss_kwargs and not honors_num_items(model):
        found.append(
            Finding(
                f"Loss: {type(model).__name__} does not divide by num_items_in_batch, although Trainer assumes that it "
                f"does. Loss and gradient are {divided} times too large (gradient accumulation x processes).",
                "Use AccelTrainer(micro_batch_size=...), which corrects the loss, or gradient_accumulation_steps=1.",
            )
        )
    if args.train_sampling_strategy == "group_by_length":
        found.append(
            Finding(
                "Resume: train_sampling_strategy='group_by_length' draws its order from the global generator. "
                "Checkpoints do not save its state at the start of an epoch.",
                "A run that is resumed after its first epoch sees other batches. Use LengthGrouped().",
            )
        )
    if args.ignore_data_skip:
        found.append(
            Finding(
                "Resume: ignore_data_skip=True restarts the epoch. Some examples come twice and others not at all.",
                "Set ignore_data_skip=False.",
            )
        )
    if args.save_only_model and args.save_strategy != SaveStrategy.NO:
        found.append(
            Finding("Resume: save_only_model=True saves no optimizer and no position.", "Set save_only_model=False.")
        )
    return found


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else _ms(seconds)


@contextlib.contextmanager
def instead_of_training(do: Callable[[Trainer], None]) -> Iterator[None]:
    """Give a trainer that starts to train inside to a function, and end the script there."""
    plain = Trainer.train

    def train(self: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.train = plain
        do(self)
        raise SystemExit(0)

    Trainer.train = train  # type: ignore[method-assign]
    try:
        yield
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        Trainer.train = plain
