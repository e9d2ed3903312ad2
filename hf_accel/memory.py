"""The largest micro-batch that fits, without a change to the examples of an update.

One process: where memory does not suffice, the gradients of the step are dropped, generators and buffers are restored,
the micro-batch halves and the same step is done again; the result is that of a run that started at the smaller size.
Several ranks: the size is agreed on before the first step, by a trial at the longest examples; a retry of one rank
alone would leave the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from hf_accel import checkpoint as ckpt
from hf_accel.stream import StepBatch, StepPlan

if TYPE_CHECKING:
    from hf_accel.stepping import Stepping


class NotEnoughMemory(RuntimeError):
    """Memory that does not suffice, with what to do about it."""


def first_micro_batch_size(trainer: Stepping) -> int:
    """The size to start with."""
    requested = trainer.requested_micro_batch_size
    if requested is None:
        return trainer._train_batch_size
    if requested == "auto":
        if trainer.is_deepspeed_enabled:
            raise ValueError("micro_batch_size='auto': not under DeepSpeed. Give a number.")
        return trainer._train_batch_size * trainer.accumulation_steps
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"micro_batch_size({requested!r}): must be 'auto' or a number above zero. Give one.")
    return requested


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def accumulate(trainer: Stepping, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
    """The gradient of a step, in micro-batches that fit."""
    observed = len(trainer._observed)
    saved = [buffer.clone() for buffer in model.buffers()]
    states = _random_states(trainer.args.device)
    while True:
        try:
            return trainer._accumulate_once(model, batch, num_items)
        except RuntimeError as error:
            size = trainer.micro_batch_size
            if not is_out_of_memory(error):
                raise
            if trainer.args.world_size > 1 or size == 1:
                raise NotEnoughMemory(_advice(trainer, size)) from error
        # Outside of the handler, which would keep the failed step's activations alive.
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        _restore_random_states(trainer.args.device, states)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), saved, strict=True):
                buffer.copy_(before)
        del trainer._observed[observed:]
        trainer.set_micro_batch_size(size // 2)
        batch = trainer.read_again(batch.plan)
        num_items = trainer._count_items(batch)


def _advice(trainer: Stepping, size: int) -> str:
    whole, _ = ckpt.newest_complete(trainer.args.output_dir)
    where = f"resume from {whole}" if whole else "start anew"
    if size == 1:
        return "memory does not suffice for one example. Shorten the examples or shard the model."
    return (
        f"memory does not suffice for micro-batches of {size} at step {trainer.state.global_step}: "
        f"{where} with micro_batch_size={size // 2}."
    )


def agree(trainer: Stepping) -> int:
    """The largest micro-batch, by halving, that fits on every rank at the longest examples."""
    size = trainer.micro_batch_size
    while True:
        fits = torch.tensor(float(_fits(trainer, size)))
        torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN, group=trainer._cpu_group)
        if fits.item():
            return size
        if size == 1:
            raise NotEnoughMemory(_advice(trainer, size))
        size //= 2


def _fits(trainer: Stepping, size: int) -> bool:
    """Whether one forward and backward pass over the longest examples fits on this rank."""
    stream = trainer.stream
    assert stream is not None
    longest = _longest(stream.reader.dataset)
    plan = StepPlan(0, torch.full((size,), longest), None, size, seed=stream.seed)
    # Not through DDP, which would wait for the other ranks.
    model = trainer.model
    with random_state_kept(trainer.args.device):
        buffers = [buffer.clone() for buffer in model.buffers()]
        try:
            inputs = trainer._prepare_inputs(stream.read(plan).micro_batches[0].inputs)
            model.train()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()  # type: ignore[union-attr]
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)


def _longest(dataset: Any) -> int:
    """Index of the longest example, by its ``input_ids``; 0 where examples have none."""
    first = dataset[0]
    if "input_ids" not in first:
        return 0
    lengths = torch.tensor([len(dataset[i]["input_ids"]) for i in range(len(dataset))])
    return int(lengths.argmax())


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the generators that a model draws from as they were found."""
    states = _random_states(device)
    try:
        yield
    finally:
        _restore_random_states(device, states)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _restore_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.random.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
