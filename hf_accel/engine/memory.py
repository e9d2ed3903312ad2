"""Find the largest micro-batch that fits, without a change to the examples of an update.

One process halves the micro-batch when it runs out of memory.  It drops the gradients of the step, restores generators
and buffers, and repeats the step.  The result equals that of a run that started at the smaller size.

Several ranks agree on the size before the first step, by a trial at the longest examples.  A retry of one rank alone
would leave the others waiting.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_accel.checkpoints import format as ckpt
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView
from hf_accel.preserve import random_states, restore_random_states
from hf_accel.technique import State, Technique

Result = TypeVar("Result")
TechniqueState = tuple[Technique, Literal["global", "rank"], State]

HOOKS_WITHIN_A_STEP = frozenset({"transform_batch", "loss_weights", "extra_loss"})
"""Hooks that run again when a step is repeated."""

PATIENCE = datetime.timedelta(seconds=30)
"""Timeout of sharded ranks, which run in lockstep, at the end of a trial."""


class NotEnoughMemory(RuntimeError):
    """Report a lack of memory, and how to continue."""


def first_micro_batch_size(host: TrainerView, requested: int | Literal["auto"] | None, accumulation_steps: int) -> int:
    """Return the first size of a micro-batch."""
    if requested is None:
        return host.train_batch_size
    if requested == "auto":
        if host.is_deepspeed_enabled:
            raise ValueError("micro_batch_size='auto' does not support DeepSpeed. Pass a number.")
        if host.is_fsdp_enabled and not host.accelerator.is_fsdp2:
            raise ValueError("micro_batch_size='auto' does not support FSDP version 1. Use version 2 or pass a number.")
        return host.train_batch_size * accumulation_steps
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"micro_batch_size({requested!r}): must be 'auto' or a number above zero. Pass one.")
    return requested


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports a lack of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


class StepSnapshot:
    """Keep a copy of everything that a failed attempt at a step may change."""

    def __init__(self, model: nn.Module, device: torch.device, states: list[TechniqueState], observed: list[Any]):
        self.model, self.device, self.states, self.observed = model, device, states, observed
        self.gradients = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.random = random_states(device)
        self.num_observed = len(observed)

    def restore(self) -> None:
        """Free the memory of the attempt, and restore everything else."""
        self.model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient.clone()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
        restore_random_states(self.device, self.random)
        del self.observed[self.num_observed :]
        for technique, scope, state in self.states:
            technique.load_state_dict(scope, copy.deepcopy(state))


def technique_states(roster: Roster) -> list[TechniqueState]:
    """Return the states of techniques with hooks inside a step, because some count their calls."""
    asked = [t for t in roster.techniques if t.implemented_hooks() & HOOKS_WITHIN_A_STEP]
    return [(t, scope, copy.deepcopy(t.state_dict(scope))) for t in asked for scope in ("global", "rank")]


def smaller(size: int, rows: int) -> int:
    """Halve the size until it is less than the given number of rows."""
    while size >= rows:
        size //= 2
    return size


def advice(rows: int, micro_batch_size: int, step: int, output_dir: str) -> str:
    """Return an error message for micro-batches of so many rows, with a remedy."""
    if rows == 1:
        return "One example does not fit into memory. Shorten the examples or shard the model."
    whole, _ = ckpt.newest_complete(output_dir)
    where = f"Resume from {whole}" if whole else "Start again"
    return (
        f"Micro-batches of {rows} examples do not fit into memory at step {step}. "
        f"{where} with micro_batch_size={smaller(micro_batch_size, rows)}."
    )


def agree_micro_batch_size(
    size: int, fits: Callable[[int, int], bool], dataset: Any, host: TrainerView, ranks: Ranks
) -> int:
    """Return the largest micro-batch, by halving, of the longest examples that fits on every rank.

    Args:
        fits: Return whether ``size`` copies of the example at ``index`` fit on this rank.
    """
    group = ranks.cpu_group  # all ranks must create it, so before one may fail
    longest = _longest(dataset)
    while True:
        fitting = torch.tensor(float(fits(size, longest)))
        work = torch.distributed.all_reduce(fitting, torch.distributed.ReduceOp.MIN, group=group, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE) if isinstance(host.model, FSDPModule) else work.wait()
        except RuntimeError as error:
            # If only some sharded ranks run out of memory, the others wait for them forever, so end them.
            raise NotEnoughMemory(
                f"Micro-batches of {size} examples fit into memory on some ranks only. Start again with "
                f"micro_batch_size={max(size // 2, 1)}."
            ) from error
        if fitting.item():
            return size
        if size == 1:
            raise NotEnoughMemory(advice(1, size, host.state.global_step + 1, host.args.output_dir))
        size //= 2


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Allocate as much memory as an optimizer with two moments; nothing if it already has its state."""
    if optimizer.state:
        return []
    return [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]


def fits(model: nn.Module, optimizer: torch.optim.Optimizer, before: StepSnapshot, attempt: Callable[[], Any]) -> bool:
    """Return whether the passes of ``attempt()`` fit on this rank beside the moments of the optimizer."""
    held: list[Tensor] = []
    try:
        held += moments(model, optimizer)
        attempt()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if isinstance(model, FSDPModule):
            # Finish the interrupted pass in FSDP's own state; it stopped at the same place on every rank.
            model._get_fsdp_state()._root_post_backward_final_callback()
        held.clear()
        before.restore()


def _longest(dataset: Any) -> int:
    """Return the index of the example with the most ``input_ids``; 0 if examples have none."""
    first = dataset[0]
    if "input_ids" not in first:
        return 0
    lengths = torch.tensor([len(dataset[i]["input_ids"]) for i in range(len(dataset))])
    return int(lengths.argmax())
