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

from hf_accel.batch import StepBatch, StepPlan
from hf_accel.checkpoints import format as ckpt
from hf_accel.preserve import random_states, restore_random_states
from hf_accel.technique import State, Technique

Result = TypeVar("Result")
TechniqueState = tuple[Technique, Literal["global", "rank"], State]

HOOKS_WITHIN_A_STEP = frozenset({"transform_batch", "example_weights", "token_weights", "extra_loss"})
"""Hooks that are asked again when a step is done again."""

PATIENCE = datetime.timedelta(seconds=30)
"""How long sharded ranks, which go in step, wait for each other at the end of a trial."""


class NotEnoughMemory(RuntimeError):
    """Memory that does not suffice, with what to do about it."""


def first_micro_batch_size(trainer: Any) -> int:
    """The size to start with."""
    requested = trainer.requested_micro_batch_size
    if requested is None:
        return trainer._train_batch_size
    if requested == "auto":
        if trainer.is_deepspeed_enabled:
            raise ValueError("micro_batch_size='auto': not under DeepSpeed. Give a number.")
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError("micro_batch_size='auto': not under the first FSDP. Give a number, or use version 2.")
        return trainer._train_batch_size * trainer.accumulation_steps
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"micro_batch_size({requested!r}): must be 'auto' or a number above zero. Give one.")
    return requested


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def retry_on_oom(trainer: Any, model: nn.Module, batch: StepBatch, attempt: Callable[[StepBatch], Result]) -> Result:
    """``attempt(batch)``, in micro-batches that fit.

    ``batch`` holds in the end what was attempted last: Trainer counts the operations of the batch that it knows.
    """
    if trainer.requested_micro_batch_size != "auto":
        return attempt(batch)
    alone = trainer.args.world_size == 1
    before = StepSnapshot(trainer, model, trainer.step_states) if alone else None
    while True:
        try:
            return attempt(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Of examples: a technique may have cut them into pieces.
            rows = min(max(len(micro.ids_B) for micro in batch.micro_batches), trainer.micro_batch_size)
            if before is None or rows == 1:
                raise NotEnoughMemory(_advice(trainer, rows)) from error
        # Outside of the handler, which would keep the failed attempt's activations alive.
        before.restore()
        trainer.set_micro_batch_size(_smaller(trainer.micro_batch_size, rows))
        smaller = trainer.read_again(batch.plan)
        batch.micro_batches[:] = smaller.micro_batches


class StepSnapshot:
    """What a failed attempt at a step has touched, as it was."""

    def __init__(self, trainer: Any, model: nn.Module, states: list[TechniqueState]):
        self.trainer, self.model, self.states = trainer, model, states
        self.gradients = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.random = random_states(trainer.args.device)
        self.num_observed = len(trainer._observed)

    def restore(self) -> None:
        """Give back the memory of the attempt, and put everything in its place."""
        self.model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient.clone()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
        restore_random_states(self.trainer.args.device, self.random)
        del self.trainer._observed[self.num_observed :]
        for technique, scope, state in self.states:
            technique.load_state_dict(scope, copy.deepcopy(state))


def technique_states(trainer: Any) -> list[TechniqueState]:
    """What the techniques know that are asked within a step, some of whom count what they are asked."""
    asked = [t for t in trainer.techniques if t.implemented_hooks() & HOOKS_WITHIN_A_STEP]
    return [(t, scope, copy.deepcopy(t.state_dict(scope))) for t in asked for scope in ("global", "rank")]


def _smaller(size: int, rows: int) -> int:
    """The next size, by halving, that divides micro-batches of so many rows."""
    while size >= rows:
        size //= 2
    return size


def _advice(trainer: Any, rows: int) -> str:
    if rows == 1:
        return "memory does not suffice for one example. Shorten the examples or shard the model."
    whole, _ = ckpt.newest_complete(trainer.args.output_dir)
    where = f"resume from {whole}" if whole else "start anew"
    return (
        f"memory does not suffice for micro-batches of {rows} examples at step {trainer.state.global_step + 1}: "
        f"{where} with micro_batch_size={_smaller(trainer.micro_batch_size, rows)}."
    )


def agree_micro_batch_size(trainer: Any) -> int:
    """The largest micro-batch, by halving, that fits on every rank at the longest examples."""
    assert trainer.stream is not None
    size, group = trainer.micro_batch_size, trainer._cpu_group  # made before a rank may fail: all ranks make it
    longest = _longest(trainer.stream.reader.dataset)
    while True:
        fits = torch.tensor(float(_fits(trainer, size, longest)))
        work = torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN, group=group, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE) if isinstance(trainer.model, FSDPModule) else work.wait()
        except RuntimeError as error:
            # Sharded ranks that do not run out of memory together wait for each other in vain: end them.
            raise NotEnoughMemory(
                f"memory suffices for micro-batches of {size} examples on some ranks only: start anew with "
                f"micro_batch_size={max(size // 2, 1)}."
            ) from error
        if fits.item():
            return size
        if size == 1:
            raise NotEnoughMemory(_advice(trainer, size))
        size //= 2


def moments(trainer: Any) -> list[Tensor]:
    """As much memory as an optimizer with two moments takes in its first step; none where it has taken it."""
    if trainer.optimizer.state:
        return []
    return [torch.empty_like(p) for p in trainer.model.parameters() if p.requires_grad for _ in range(2)]


def _fits(trainer: Any, size: int, longest: int) -> bool:
    """Whether one forward and backward pass over copies of the longest example fits on this rank, beside the moments
    of the optimizer."""
    stream = trainer.stream
    assert stream is not None
    batch = stream.read(StepPlan(0, torch.full((size,), longest), None, size, seed=stream.seed))
    # Not through DDP, which would wait for the other ranks; a sharded model is sharded in place.
    model = trainer.model
    before = StepSnapshot(trainer, model, technique_states(trainer))
    items = trainer._count_items(batch)  # of all ranks, before memory may not suffice on one of them
    held: list[Tensor] = []
    try:
        held += moments(trainer)
        trainer._accumulate_once(model, batch, items)
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
