"""Trace the memory of a training step, tensor by tensor, without a weight in memory.

The model consists of fake tensors, which have a shape and a dtype but no data.  A forward and backward pass runs over
them.  Every storage is recorded when it appears and when it disappears, so the memory alive at once is exact.  It
includes the tensors that autograd keeps, gradients in progress, and logits in several copies.  Masks that hide padding
and memory inside kernels are not visible.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils import logging

from hf_accel.surgery.blocks import block_lists


class Peak(NamedTuple):
    """Bytes that are alive at once, at the worst moment of a forward and backward pass."""

    activations: float
    logits: float
    gradients: float

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return sum(self)


class Ledger(TorchDispatchMode):
    """Record the storages that appear and disappear inside; those of ``held`` exist before and after."""

    def __init__(self, held: Any = ()) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []
        self.shapes: dict[int, torch.Size] = {}
        self._numbers = itertools.count()
        self._known = WeakIdKeyDictionary()
        for tensor in tree_leaves(held):
            if isinstance(tensor, Tensor):
                self._known[tensor.untyped_storage()] = next(self._numbers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        number = self._known[storage] = next(self._numbers)
        self.shapes[number] = tensor.shape
        size = storage.nbytes()
        self.changes.append((number, size))
        weakref.finalize(storage, self.changes.append, (number, -size)).atexit = False

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage in ``changes``."""
        return self._known.get(tensor.untyped_storage())


@dataclass
class Trace:
    """A step of a model on one device.

    Args:
        weights: Bytes of parameters and buffers.
        parameters: Number of parameters.
        trained: Number of trained parameters.
        gradients: Bytes of all gradients.
        block: Parameters of the largest block.
        outside: Parameters outside blocks.
        alive_TC: At each time T, bytes of the three categories C of `Peak`.
    """

    weights: int
    parameters: int
    trained: int
    gradients: int
    block: int
    outside: int
    alive_TC: np.ndarray

    def peak(self, gradient_share: float = 1.0, *, past: float = 0.0) -> Peak:
        """Return the worst moment with at least ``past`` bytes of gradients, if a share of each gradient is kept."""
        scaled_TC = self.alive_TC[self.alive_TC[:, 2] >= past] * np.array([1.0, 1.0, gradient_share])
        return Peak(*scaled_TC[scaled_TC.sum(1).argmax()].tolist())


def trace(
    build: Callable[[], nn.Module],
    make_inputs: Callable[[], dict[str, Tensor]],
    *,
    autocast: bool = False,
    checkpointing: bool = False,
    lora_rank: int | None = None,
    single_adapters: bool = True,
) -> Trace:
    """Trace a forward and backward pass of the model that ``build`` makes, on fake tensors.

    Args:
        autocast: Compute the pass in bfloat16, whatever the dtype of the weights.
        checkpointing: Recompute the activations of blocks in the backward pass.
        lora_rank: Rank of adapters on all linear layers, which alone are trained; None: no adapters.
        single_adapters: Keep adapters in single precision, as peft makes them, whatever the dtype of the weights.
    """
    with _silenced(), torch.device("meta"):
        model: Any = build().train()
        if checkpointing:
            checkpoint_blocks(model)
        adapted = model if lora_rank is None else with_adapters(model, lora_rank, single_adapters)
    with _silenced(), FakeTensorMode():
        _put_on_cpu(adapted)
        inputs = make_inputs()
        tensors = {*model.parameters(), *model.buffers()}
        with Ledger([*tensors, *inputs.values()]) as ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = adapted(**inputs).loss
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        gradients = {ledger.number_of(grad) for grad in grads}
        words = _width_of_logits(model)
        shapes = [(n, shape) for n, shape in ledger.shapes.items() if n not in gradients]
        logits = {n for n, shape in shapes if words and len(shape) > 1 and shape[-1] == words}
        parameters, blocks = _size(model), [_size(block) for block in _blocks(model)]
        return Trace(
            weights=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
            parameters=parameters,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            gradients=sum(grad.numel() * grad.itemsize for grad in grads),
            block=max(blocks),
            outside=parameters - sum(blocks),
            alive_TC=_alive(ledger.changes, logits, gradients),
        )


def _put_on_cpu(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors, because kernels of meta tensors differ from those that train."""
    moved: dict[Tensor, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if tensor not in moved:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[tensor] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
        return moved[tensor]

    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, move(tensor))


def _alive(changes: list[tuple[int, int]], logits: set[int], gradients: set[int | None]) -> np.ndarray:
    changes_TC = np.zeros((len(changes) + 1, 3))
    for time, (number, size) in enumerate(changes, 1):
        changes_TC[time, 2 if number in gradients else 1 if number in logits else 0] = size
    return changes_TC.cumsum(0)


def with_adapters(model: Any, rank: int, single: bool) -> nn.Module:
    """Add LoRA adapters to all linear layers except the head, in single precision or in that of the model."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return adapted if single else adapted.to(model.dtype)


def checkpoint_blocks(model: Any) -> None:
    """Make the model recompute the activations of its blocks; raise ValueError if it cannot."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} does not support activation checkpointing. Turn it off.")
    model.activation_checkpointing_enable({"use_reentrant": False})


def _width_of_logits(model: Any) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None else head.weight.shape[0]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a model; a model that names none is one block."""
    try:
        return [block for blocks in block_lists(model).values() for block in blocks]
    except ValueError:
        return [model]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress transformers' messages about each new model, and warnings about names that peft still uses."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
