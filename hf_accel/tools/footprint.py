"""The memory of a training step, tensor by tensor, without a weight in memory.

The model is built of fake tensors, which have a shape and a type and no data, and a forward and backward pass is made
over them.  Every storage is noted when it comes and when it goes, so that what is alive at once is exact: what autograd
keeps, gradients while they are made, logits in several copies.  A mask that hides padding, and what kernels need within
themselves, are not seen.
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
        """All of it."""
        return sum(self)


class Ledger(TorchDispatchMode):
    """Notes the storages that come and go inside; those of ``held`` are there before and after."""

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
        """The number in ``changes`` of a tensor's storage."""
        return self._known.get(tensor.untyped_storage())


@dataclass
class Trace:
    """A step of a model on one device.

    Args:
        weights: Bytes of parameters and buffers.
        parameters: Their number.
        trained: Number of those that are trained.
        gradients: Bytes of all gradients.
        block: Parameters of the largest block.
        outside: Parameters in no block.
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
        """The worst moment, if of each gradient only a share is kept, of those with so many bytes of gradients."""
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
    """A forward and backward pass, on fake tensors, of the model that ``build`` makes.

    Args:
        autocast: Whether the pass is computed in bfloat16, whatever the weights are in.
        checkpointing: Whether the activations of blocks are computed again in the backward pass.
        lora_rank: Of adapters on all linear layers, which are then all that is trained; None: no adapters.
        single_adapters: Whether adapters are in single precision, as peft makes them, whatever the weights are in.
    """
    with _told_nothing(), torch.device("meta"):
        model: Any = build().train()
        if checkpointing:
            checkpoint_blocks(model)
        adapted = model if lora_rank is None else with_adapters(model, lora_rank, single_adapters)
    with _told_nothing(), FakeTensorMode():
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
    """Fake tensors in the place of those without a device, whose kernels are not the ones that train."""
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
    """A model with LoRA adapters on all its linear layers but the head, made in single precision."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return adapted if single else adapted.to(model.dtype)


def checkpoint_blocks(model: Any) -> None:
    """Have the model compute the activations of its blocks again; ValueError where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__}: knows no activation checkpointing. Leave it out.")
    model.activation_checkpointing_enable({"use_reentrant": False})


def _width_of_logits(model: Any) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None else head.weight.shape[0]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(model: Any) -> list[nn.Module]:
    """The blocks of a model, which is its only one where it names none."""
    try:
        return [block for blocks in block_lists(model).values() for block in blocks]
    except ValueError:
        return [model]


@contextlib.contextmanager
def _told_nothing() -> Iterator[None]:
    """Without what transformers tells of each model that it makes, and peft's use of what transformers has renamed."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
