"""Checkpoints that are written while training goes on.

At the end of a step the tensors of a checkpoint are copied to the CPU, and training goes on.  The optimizer's state,
under FSDP2 every rank's shards of it and of the weights, is written by ``torch.distributed.checkpoint.async_save``; all
else that is large, among it ``model.safetensors`` for ``from_pretrained``, by a thread.  When every rank has written
its part, rank 0 marks the checkpoint as whole and deletes old ones.  Until then a run resumes from the one before.

    optimizer_0/            state of the optimizer; under FSDP2 as accelerate writes it for SHARDED_STATE_DICT
    pytorch_model_fsdp_0/   the same of the weights, under FSDP2

One checkpoint is written at a time: the next one waits for it, and so does the end of ``train()``.  A copy of weights
and optimizer state has to fit into the memory of the CPU.

Reference: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html#torch.distributed.checkpoint.state_dict_saver.async_save
"""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils.import_utils import is_peft_available

from hf_accel.checkpoints.format import AVERAGED, INCOMPLETE, TENSOR, flatten_state, unflatten_state
from hf_accel.engine.step import Stepping

OPTIMIZER, SHARDS = "optimizer_0", "pytorch_model_fsdp_0"
"""Folders in a checkpoint."""

SKELETON = "__skeleton__"
"""Key of what is left of a state without tensors."""

Part = Callable[[], Any]
"""Writes a part of a checkpoint."""


def snapshot(value: Any, constant: frozenset[int] = frozenset()) -> Any:
    """A copy on the CPU of tensors in nested lists and mappings; what shares memory shares it in the copy.

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


@dataclass
class Parts:
    """What is still to be written of a checkpoint: by the thread, and by ``async_save``."""

    writes: list[Part] = field(default_factory=list)
    futures: list[Any] = field(default_factory=list)


class Saving(Stepping):
    """Answers Trainer where it writes weights and optimizer, and where it reads them again."""

    def _refuse_asynchronous(self) -> None:
        """Raise where checkpoints are not ours to write."""
        if not self.async_checkpoints:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "async_checkpoints=True: under DeepSpeed the engine writes checkpoints itself. Use DDP or FSDP2, or "
                "leave it out."
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("async_checkpoints=True: needs FSDP2. Set fsdp_config={'version': 2}, or leave it out.")
        if self.is_fsdp_enabled and _is_adapted(self.model):
            raise ValueError(
                "async_checkpoints=True: adapters under FSDP2 are written by accelerate alone, with names of its own. "
                "Use DDP, or leave it out."
            )

    @functools.cached_property
    def _saving_groups(self) -> list[Any]:
        """A process group for each writer, whose messages must not mix with those of training; none where there are no
        process groups.

        All ranks make them at the same time.
        """
        if not dist.is_initialized():
            return [None, None, None]
        return [dist.new_group(backend="gloo") for _ in range(3)]

    def _begin_parts(self) -> None:
        """From here on, what is large in the checkpoint is kept for later."""
        if self.async_checkpoints:
            self._parts = Parts()
            assert self._saving_groups

    def _write(self, write: Callable, *args: Any) -> None:
        """Call ``write(*args)``, now or, with copies of the tensors in them, while training goes on."""
        if self._parts is None:
            write(*args)
        else:
            constant = frozenset(p.data_ptr() for p in self.model.parameters() if not p.requires_grad)
            constant = constant if _is_adapted(self.model) else frozenset()
            self._parts.writes.append(functools.partial(write, *(snapshot(value, constant) for value in args)))

    def _save(self, output_dir=None, state_dict=None):
        if self._parts is not None and self.args.should_save and super()._save.__func__ is Trainer._save:
            given = self.model.state_dict() if state_dict is None else state_dict
            if not any(isinstance(tensor, DTensor) for tensor in given.values()):  # else all ranks gather them
                return self._write(super(Saving, self._as_it_is())._save, output_dir, given)
        return super()._save(output_dir, state_dict)

    def _as_it_is(self) -> Saving:
        """This trainer with the configuration of now, which a model that grows will change."""
        if not hasattr(self.model, "config"):
            return self
        saver, model = copy.copy(self), object.__new__(type(self.model))  # copy.copy fails under FSDP2
        vars(model).update(vars(self.model), config=copy.deepcopy(self.model.config))
        saver.model = model
        return saver

    def _save_optimizer_and_scheduler(self, output_dir):
        if self._parts is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled:
            self._async_save(output_dir, SHARDS, {"model": get_model_state_dict(self.model)})
            state = get_optimizer_state_dict(self.model, self.optimizer)
            self._async_save(output_dir, OPTIMIZER, {"optimizer": state})
        elif self.args.should_save:
            tensors: dict[str, Tensor] = {}
            # Of nested states, async_save makes strings of the numbers that parameters go by.
            skeleton = flatten_state(self.optimizer.state_dict(), tensors)
            self._async_save(output_dir, OPTIMIZER, {SKELETON: (skeleton,), TENSOR: tensors}, alone=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _async_save(self, output_dir: str, folder: str, state: dict[str, Any], alone: bool = False) -> None:
        """Begin to write a state into a folder, all ranks together or this one alone."""
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said in a thread, where none can catch it
        group = self._saving_groups[folder == OPTIMIZER]
        place = Path(output_dir, folder)
        future = dcp.async_save(state, checkpoint_id=place, process_group=group, no_dist=alone)
        self._parts.futures.append(future)

    def _finish_in_background(self, complete: Part) -> Future[tuple[str | None, float]]:
        """Write the parts, then ``complete`` on the rank that saves.

        The future gives what went wrong on any rank, and the seconds of the clock.
        """
        parts, self._parts = self._parts, None
        group, saves = self._saving_groups[2], self.args.should_save

        def write() -> tuple[str | None, float]:
            error = agreed(attempt([*parts.writes, *(future.result for future in parts.futures)]), group)
            error = error or agreed(attempt([complete] if saves else []), group)
            return error, self.clock.seconds

        executor = ThreadPoolExecutor(1, "checkpoint")
        future = executor.submit(write)
        executor.shutdown(wait=False)
        return future

    # Reading --------------------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.is_fsdp_enabled or not Path(checkpoint, OPTIMIZER).is_dir():
            with self._reading(checkpoint):
                return super()._load_optimizer_and_scheduler(checkpoint)
        self.optimizer.load_state_dict(load(Path(checkpoint, OPTIMIZER)))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    @contextlib.contextmanager
    def _reading(self, checkpoint: str | None) -> Iterator[None]:
        """Let accelerate read shards where shards were written, whatever it was told to write."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or checkpoint is None or not Path(checkpoint, SHARDS).is_dir():
            yield
            return
        fields = "state_dict_type", "state_dict_config", "optim_state_dict_config"
        before = {field: getattr(plugin, field) for field in fields}
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("SHARDED_STATE_DICT")
        try:
            yield
        finally:
            for field, value in before.items():
                setattr(plugin, field, value)


def attempt(parts: list[Part]) -> str | None:
    """Write all parts; in words, the first thing that went wrong."""
    error = None
    for part in parts:
        try:
            part()
        except CheckpointException as raised:  # of several ranks
            error = error or _said(next(iter(raised.failures.values()))[0])
        except Exception as raised:
            error = error or _said(raised)
    return error


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def agreed(error: str | None, group: Any) -> str | None:
    """The error of the first rank that has one; waits for all."""
    if group is None:
        return error
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    return next((found for found in errors if found is not None), None)


def clear(directory: Path) -> None:
    """Remove what an earlier run has left of ours in a checkpoint that is written anew."""
    for folder in (OPTIMIZER, SHARDS):
        shutil.rmtree(directory / folder, ignore_errors=True)
    for file in (*directory.glob("accel_*"), directory / AVERAGED):
        if file.name != INCOMPLETE:
            file.unlink(missing_ok=True)


def load(folder: Path) -> Any:
    """The state that was taken apart and written into a folder, on the CPU."""
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


def _is_adapted(model: Any) -> bool:
    if is_peft_available():
        from peft import PeftModel

        return isinstance(model, PeftModel)
    return False
