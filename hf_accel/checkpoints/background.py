"""Write checkpoints during training.

At the end of a step the tensors of a checkpoint are copied to the CPU, and training continues.
``torch.distributed.checkpoint.async_save`` writes the optimizer's state; under FSDP2 it writes every rank's shards of
this state and of the weights.  A thread writes all other large parts, such as ``model.safetensors`` for
``from_pretrained``.  When every rank has written its part, rank 0 marks the checkpoint as complete and deletes old
ones.  Until then a run resumes from the one before.

    optimizer_0/            state of the optimizer; under FSDP2 as accelerate writes it for SHARDED_STATE_DICT
    pytorch_model_fsdp_0/   the same of the weights, under FSDP2

One checkpoint is written at a time: the next one waits for it, and so does the end of ``train()``.  A copy of weights
and optimizer state has to fit into the memory of the CPU.

Reference: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html#torch.distributed.checkpoint.state_dict_saver.async_save
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hf_accel.checkpoints.format import TENSOR, flatten_state, unflatten_state

OPTIMIZER, SHARDS = "optimizer_0", "pytorch_model_fsdp_0"
"""Folders in a checkpoint."""

SKELETON = "__skeleton__"
"""Key of a state without its tensors."""

Part = Callable[[], Any]
"""Function that writes a part of a checkpoint."""


def snapshot(value: Any, constant: frozenset[int] = frozenset()) -> Any:
    """Copy tensors in nested lists and mappings to the CPU; tensors that share memory share it in the copy.

    Tensors at the addresses ``constant`` are not copied.
    """
    seen: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.data_ptr() in constant:
                return value.detach()
            key = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
            if key not in seen:
                seen[key] = value.detach().to("cpu", copy=True)
            return seen[key]
        if isinstance(value, Mapping):
            return {name: copied(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [copied(item) for item in value]
        return value

    return copied(value)


def process_groups() -> list[Any]:
    """Return a process group for each writer, or None for each without ``torch.distributed``.

    Messages of writers must not mix with those of training.  All ranks make the groups at the same time.
    """
    if not dist.is_initialized():
        return [None, None, None]
    return [dist.new_group(backend="gloo") for _ in range(3)]


@dataclass
class Parts:
    """Remaining parts of a checkpoint, for the thread and for ``async_save``."""

    writes: list[Part] = field(default_factory=list)
    futures: list[Any] = field(default_factory=list)

    def save_state(self, folder: Path, state: dict[str, Any], group: Any) -> None:
        """Begin to write a state into a folder, all ranks together."""
        self._save(folder, state, group, alone=False)

    def save_alone(self, folder: Path, state: Any, group: Any) -> None:
        """Begin to write a state into a folder, this rank alone."""
        tensors: dict[str, Tensor] = {}
        # In nested states, async_save turns the parameters' numbers into strings.
        skeleton = flatten_state(state, tensors)
        self._save(folder, {SKELETON: (skeleton,), TENSOR: tensors}, group, alone=True)

    def _save(self, folder: Path, state: dict[str, Any], group: Any, *, alone: bool) -> None:
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a thread warns, out of reach
        self.futures.append(dcp.async_save(state, checkpoint_id=folder, process_group=group, no_dist=alone))

    def finish(self, complete: Part | None, group: Any, now: Callable[[], float]) -> Future[tuple[str | None, float]]:
        """Write the parts in a thread, then ``complete`` on the rank that saves.

        The future returns an error of any rank, and the time at the end.
        """

        def write() -> tuple[str | None, float]:
            error = agreed(attempt([*self.writes, *(future.result for future in self.futures)]), group)
            error = error or agreed(attempt([] if complete is None else [complete]), group)
            return error, now()

        executor = ThreadPoolExecutor(1, "checkpoint")
        future = executor.submit(write)
        executor.shutdown(wait=False)
        return future


def attempt(parts: list[Part]) -> str | None:
    """Write all parts; return the first error in words."""
    error = None
    for part in parts:
        try:
            part()
        except CheckpointException as raised:  # of several ranks
            error = error or _in_words(next(iter(raised.failures.values()))[0])
        except Exception as raised:
            error = error or _in_words(raised)
    return error


def _in_words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def agreed(error: str | None, group: Any) -> str | None:
    """Wait for all ranks, and return the error of the first rank that has one."""
    if group is None:
        return error
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    return next((found for found in errors if found is not None), None)


def load(folder: Path) -> Any:
    """Return the state that `Parts.save_alone` wrote into a folder, on the CPU."""
    reader = dcp.FileSystemReader(folder)
    found: dict[str, Any] = {SKELETON: None}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=True)
    (skeleton,) = found.pop(SKELETON)  # a tuple is not looked into
    return unflatten_state(skeleton, {name.removeprefix(f"{TENSOR}."): found[name] for name in found})
