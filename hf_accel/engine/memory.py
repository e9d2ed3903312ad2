"""The largest micro-batch that fits, without a change to the examples of an update.

One process: where memory does not suffice, the gradients of the step are dropped, generators and buffers are restored,
the micro-batch halves and the same step is done again; the result is that of a run that started at the smaller size.
Several ranks: the size is agreed on before the first step, by a trial at the longest examples; a retry of one rank
alone would leave the others waiting.
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

HOOKS_WITHIN_A_STEP = frozenset({"transform_batch", "example_weights", "token_weights", "extra_loss"})
"""Hooks that are asked again when a step is done again."""

PATIENCE = datetime.timedelta(seconds=30)
"""How long sharded ranks, which go in step, wait for each other at the end of a trial."""


class NotEnoughMemory(RuntimeError):
    """Memory does not suffice; says what to do about it."""


def first_micro_batch_size(host: TrainerView, requested: int | Literal["auto"] | None, accumulation_steps: int) -> int:
    """The size to start with."""
    if requested is None:
        return host.train_batch_size
    if requested == "auto":
        if host.is_deepspeed_enabled:
            raise ValueError("micro_batch_size='auto' does not support DeepSpeed. Give a number.")
        if host.is_fsdp_enabled and not host.accelerator.is_fsdp2:
            raise ValueError("micro_batch_size='auto' does not support FSDP version 1. Use version 2, or a number.")
        return host.train_batch_size * accumulation_steps
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"micro_batch_size({requested!r}): must be 'auto' or a number above zero. Give one.")
    return requested


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


class StepSnapshot:
    """Snapshot of everything that a failed attempt at a step may have changed."""

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
    """States of the techniques whose hooks run within a step, for some count how often they are asked."""
    asked = [t for t in roster.techniques if t.implemented_hooks() & HOOKS_WITHIN_A_STEP]
    return [(t, scope, copy.deepcopy(t.state_dict(scope))) for t in asked for scope in ("global", "rank")]


def smaller(size: int, rows: int) -> int:
    """The next size, by halving, that divides micro-batches of so many rows."""
    while size >= rows:
        size //= 2
    return size


def advice(rows: int, micro_batch_size: int, step: int, output_dir: str) -> str:
    """What to do where micro-batches of so many rows do not fit."""
    if rows == 1:
        return "memory does not suffice for one example. Shorten the examples or shard the model."
    whole, _ = ckpt.newest_complete(output_dir)
    where = f"resume from {whole}" if whole else "start anew"
    return (
        f"memory does not suffice for micro-batches of {rows} examples at step {step}: "
        f"{where} with micro_batch_size={smaller(micro_batch_size, rows)}."
    )


def agree_micro_batch_size(
    size: int, fits: Callable[[int, int], bool], dataset: Any, host: TrainerView, ranks: Ranks
) -> int:
    """The largest micro-batch, by halving, that fits on every rank at the longest examples.

    Args:
        fits: Of a size and the index of an example, whether so many copies of it fit on this rank.
    """
    group = ranks.cpu_group  # made before a rank may fail: all ranks make it
    longest = _longest(dataset)
    while True:
        fitting = torch.tensor(float(fits(size, longest)))
        work = torch.distributed.all_reduce(fitting, torch.distributed.ReduceOp.MIN, group=group, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE) if isinstance(host.model, FSDPModule) else work.wait()
        except RuntimeError as error:
            # Sharded ranks that do not run out of memory together wait for each other in vain: end them.
            raise NotEnoughMemory(
                f"memory suffices for micro-batches of {size} examples on some ranks only: start anew with "
                f"micro_batch_size={max(size // 2, 1)}."
            ) from error
        if fitting.item():
            return size
        if size == 1:
            raise NotEnoughMemory(advice(1, size, host.state.global_step + 1, host.args.output_dir))
        size //= 2


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As much memory as an optimizer with two moments takes in its first step; none where it has taken it."""
    if optimizer.state:
        return []
    return [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]


def fits(model: nn.Module, optimizer: torch.optim.Optimizer, before: StepSnapshot, attempt: Callable[[], Any]) -> bool:
    """Whether one forward and backward pass, ``attempt()``, fits on this rank beside the moments of the optimizer."""
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
            # Leave it as after a whole pass, wherever it broke off; the same place on every rank.
            model._get_fsdp_state()._root_post_backward_final_callback()
        held.clear()
        before.restore()


def _longest(dataset: Any) -> int:
    """Index of the longest example, by its ``input_ids``; 0 where examples have none."""
    first = dataset[0]
    if "input_ids" not in first:
        return 0
    lengths = torch.tensor([len(dataset[i]["input_ids"]) for i in range(len(dataset))])
    return int(lengths.argmax())
