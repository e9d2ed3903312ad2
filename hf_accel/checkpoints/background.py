"""Write checkpoints during training.

At the end of a step the tensors of a checkpoint are copied to the CPU, and training continues.  A thread writes the
files of Trainer, such as ``optimizer.pt``, and ours.  Under FSDP2, ``torch.distributed.checkpoint.async_save`` writes
every rank's shards.  When every rank has written its part, rank 0 marks the checkpoint as complete and deletes old
ones.  Until then a run resumes from the one before.

    optimizer_0/            shards of the optimizer's state, as accelerate writes them for SHARDED_STATE_DICT
    pytorch_model_fsdp_0/   shards of the weights

``torch.distributed.checkpoint`` unpickles when it reads shards: resume from shards only if you trust who wrote them.

One checkpoint is written at a time: the next one waits for it, and so does the end of ``train()``.  A copy of weights
and optimizer state has to fit into the memory of the CPU.

Reference: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html#torch.distributed.checkpoint.state_dict_saver.async_save
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

OPTIMIZER, SHARDS = "optimizer_0", "pytorch_model_fsdp_0"
"""Folders in a checkpoint."""

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
            kind = tuple if isinstance(value, tuple) else list
            return kind(copied(item) for item in value)
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
        self.futures.append(dcp.async_save(state, checkpoint_id=folder, process_group=group))

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
