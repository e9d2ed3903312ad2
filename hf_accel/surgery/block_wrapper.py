"""Run functions around the calls of a model's blocks, which may skip a call.

A subclass replaces a block's class, and its ``__call__`` runs the given functions.  They run outside of hooks, of
activation checkpointing and of FSDP2's gathering, so a skipped block costs nothing.  Copies of the model, by
``copy.deepcopy`` or pickle, have the original class.

Techniques that draw for each example use `ExampleSeeds`.  If some blocks get no gradient, `refuse_waiting_ddp` raises
where that would hang.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from hf_accel.technique import Technique

Around = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""Function of a call and its arguments that returns the result."""


def wrap_block(block: nn.Module, around: Around, *, innermost: bool = False) -> Callable[[], None]:
    """Run ``around`` instead of every call of a block, and return a function that ends this.

    Args:
        innermost: Whether it runs inside the earlier wrappers instead of around them.
    """
    kind: Any = type(block)
    if "_arounds" not in vars(kind):
        kind = type(kind.__name__, (_WrappedForward, kind), {"__module__": kind.__module__, "_arounds": []})
        block.__class__ = kind
    kind._arounds.insert(0 if innermost else len(kind._arounds), around)

    def end() -> None:
        kind._arounds.remove(around)
        if not kind._arounds and type(block) is kind:
            block.__class__ = kind.__mro__[2]

    return end


class _WrappedForward:
    _arounds: list[Around]
    """Wrappers from the innermost to the outermost."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        for around in self._arounds:
            call = functools.partial(_call_around, around, call)
        return call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return copyreg._reconstructor, (type(self).__mro__[2], object, None), *state  # type: ignore[attr-defined]


def _call_around(around: Around, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return around(call, args, kwargs)


def hidden_states(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the first argument of a block."""
    return args[0] if args else kwargs[next(iter(inspect.signature(block.forward).parameters))]


class ExampleSeeds:
    """Keys of random draws for the rows of a batch: the ids of their examples if known, or else places in the step.

    Args:
        technique: Technique that draws.
        args: Arguments of the trainer.
        step: Number of the step.
    """

    def __init__(self, technique: Technique, args: TrainingArguments, step: int):
        self.run: Any = technique.run_
        self.of_step = args.seed, step
        self.first_row = args.process_index * args.per_device_train_batch_size
        self.rows_of_a_pass = args.world_size * args.per_device_train_batch_size
        self.passes = 0

    @property
    def streamed(self) -> bool:
        """Return whether the ids of examples are known."""
        return self.run is not None and self.run.stream is not None

    def of_examples(self, model: Any, inputs: Mapping[str, Any]) -> list[int] | None:
        """Return a key for each example of the next pass; None in evaluation and in scoring passes."""
        if not model.training or (self.streamed and self.run.micro_batch is None):
            return None
        if self.streamed:
            return self.of_micro_batch()
        rows = len(inputs[getattr(model, "main_input_name", "input_ids")])
        start = self.passes * self.rows_of_a_pass + self.first_row
        self.passes += 1
        return list(range(start, start + rows))

    def of_micro_batch(self) -> list[int]:
        """Return a key for each example of the stream's current micro-batch."""
        return [i % 2**32 for i in self.run.micro_batch.ids_B.tolist()]


def refuse_other_shape(technique: Technique, before: Tensor, after: Tensor) -> None:
    """Raise ValueError if a block changes the shape of its hidden states, so that it cannot be skipped."""
    if before.shape[1:] != after.shape[1:]:
        raise ValueError(
            f"{technique!r} does not support this model because a block changes hidden states from "
            f"{tuple(before.shape)} to {tuple(after.shape)} and cannot be skipped. Remove {type(technique).__name__}."
        )


def refuse_zero(technique: Technique, args: Any) -> None:
    """Raise ValueError under DeepSpeed ZeRO, with the technique's reason."""
    if args.deepspeed_plugin is not None:
        raise ValueError(
            f"{technique!r} does not support ZeRO because {technique.refused_backends['zero']}. Use DDP or FSDP2."
        )


def refuse_waiting_ddp(technique: Technique, args: Any, model: nn.Module) -> None:
    """Raise ValueError if DDP would wait for gradients that do not come."""
    if args.world_size == 1 or any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    finds = args.ddp_find_unused_parameters
    if finds is False or (finds is None and args.gradient_checkpointing):
        why = "False" if finds is False else "None and checkpointing"
        raise ValueError(
            f"{technique!r}: with ddp_find_unused_parameters={why}, DDP waits for the gradients of blocks that have "
            "none. Set ddp_find_unused_parameters=True."
        )
