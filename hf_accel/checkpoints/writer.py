"""Write checkpoints that are complete or absent, at once or during training."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from hf_accel.adapters import is_adapted
from hf_accel.checkpoints import format as ckpt
from hf_accel.checkpoints.background import OPTIMIZER, SHARDS, Parts, process_groups, snapshot
from hf_accel.host.view import TrainerView

logger = logging.get_logger(__name__)


class CheckpointWriter:
    """Write the checkpoints of a trainer.

    Args:
        in_background: Write them during training.
    """

    def __init__(self, host: TrainerView, *, in_background: bool):
        self.host, self.in_background = host, in_background
        self._parts: Parts | None = None
        self._pending: tuple[Path, float, Future[tuple[str | None, float]]] | None = None

    @functools.cached_property
    def groups(self) -> list[Any]:
        """Return the process groups of the writers."""
        return process_groups()

    def refuse_backends(self) -> None:
        """Raise ValueError if checkpoints cannot be written in the background."""
        if not self.in_background:
            return
        host = self.host
        if host.is_deepspeed_enabled:
            raise ValueError(
                "async_checkpoints=True does not support DeepSpeed, whose engine writes checkpoints itself. Use DDP or "
                "FSDP2, or set async_checkpoints=False."
            )
        if host.is_fsdp_enabled and not host.accelerator.is_fsdp2:
            raise ValueError("async_checkpoints=True needs FSDP2. Set fsdp_config={'version': 2}.")
        if host.is_fsdp_enabled and is_adapted(host.model):
            raise ValueError(
                "async_checkpoints=True does not support adapters under FSDP2, which accelerate alone can write. "
                "Use DDP, or set async_checkpoints=False."
            )

    def write(
        self,
        directory: Path,
        run_dir: str,
        plain: Callable[[], Any],
        state: Callable[[], Any],
        now: Callable[[], float],
    ) -> float | None:
        """Write a checkpoint; return the seconds that it took, or None if it is still being written.

        Args:
            plain: Trainer's own ``_save_checkpoint``.
            state: Writes the engine's files.
            now: Seconds of the run.
        """
        began = now()
        try:
            self._write(directory, run_dir, plain, state, now, began)
        except (OSError, SafetensorError, RuntimeError) as error:
            self._parts = None
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in FILE_WRITERS):
                raise  # of the model or the user's own
            raise ckpt.CheckpointError(_failure(directory, error)) from error
        return now() - began if self._pending is None else None

    def _write(self, directory, run_dir, plain, state, now, began) -> None:
        host, args = self.host, self.host.args
        if args.should_save:
            ckpt.mark_incomplete(directory)
            _clear(directory)
        host.accelerator.wait_for_everyone()
        if self.in_background:
            self._parts = Parts()
            assert self.groups
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            plain()  # rotates nothing: the new checkpoint is not complete yet
        finally:
            args.save_total_limit = limit
        state()
        host.accelerator.wait_for_everyone()
        best = host.state.best_model_checkpoint

        def complete() -> None:
            ckpt.mark_complete(directory)
            rotate_checkpoints(run_dir, limit, best, use_mtime=True)

        if self._parts is not None:
            parts, self._parts = self._parts, None
            future = parts.finish(complete if args.should_save else None, self.groups[2], now)
            future.add_done_callback(lambda future: self._log_failure(directory, future.result()[0]))
            self._pending = directory, began, future
        elif args.should_save:
            complete()
            self._push(directory)

    @property
    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written in the background."""
        return self._pending is not None

    def finish(self) -> float:
        """Wait until the current checkpoint is complete, and return the seconds it took.  Raise if it failed."""
        assert self._pending is not None
        (directory, began, future), self._pending = self._pending, None
        error, ended = future.result()
        if error is not None:
            raise ckpt.CheckpointError(_failure(directory, error))
        self._push(directory)
        return ended - began

    def _log_failure(self, directory: Path, error: str | None) -> None:
        """Log an error at once; it is raised later, at the next checkpoint or the end, where all ranks meet."""
        if error is not None and self.host.args.should_save:
            logger.error(_failure(directory, error))

    def _push(self, directory: Path) -> None:
        if self.host.args.should_save and self.host.args.push_to_hub:
            self.host.push_from_checkpoint(str(directory))

    def put(self, write: Callable, *args: Any) -> None:
        """Call ``write(*args)``, now or, with copies of the tensors in them, during training."""
        if self._parts is None:
            write(*args)
            return
        model = self.host.model
        constant = frozenset(p.data_ptr() for p in model.parameters() if not p.requires_grad)
        constant = constant if is_adapted(model) else frozenset()
        self._parts.writes.append(functools.partial(write, *(snapshot(value, constant) for value in args)))

    def save_weights(self, output_dir: Any, state_dict: Any, plain: Callable[..., Any], save: Callable) -> Any:
        """Write the model; ``plain`` is Trainer's own ``_save``, and ``save`` is it as a function of a trainer."""
        host = self.host
        if self._parts is not None and host.args.should_save and getattr(plain, "__func__", None) is save:
            given = host.model.state_dict() if state_dict is None else state_dict
            if not any(isinstance(tensor, DTensor) for tensor in given.values()):  # otherwise all ranks gather them
                return self.put(functools.partial(save, host.with_frozen_config()), output_dir, given)
        return plain(output_dir, state_dict)

    def save_optimizer(self, output_dir: str, plain: Callable[[str], Any]) -> None:
        """Write optimizer and schedule; ``plain`` is Trainer's own way."""
        host, parts = self.host, self._parts
        if parts is None:
            plain(output_dir)
            return
        if host.is_fsdp_enabled:
            parts.save_state(Path(output_dir, SHARDS), {"model": get_model_state_dict(host.model)}, self.groups[0])
            state = {"optimizer": get_optimizer_state_dict(host.model, host.optimizer)}
            parts.save_state(Path(output_dir, OPTIMIZER), state, self.groups[1])
        elif host.args.should_save:
            self.put(torch.save, host.optimizer.state_dict(), Path(output_dir, OPTIMIZER_NAME))
        if host.args.should_save:
            torch.save(host.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))


FILE_WRITERS = ("PytorchStreamWriter", "inline_container")
"""Names in a RuntimeError of torch.save if a file cannot be written."""


def _failure(directory: Path, error: Exception | str) -> str:
    """Describe why a checkpoint could not be written, for example because of a full disk."""
    whole, _ = ckpt.newest_complete(directory.parent)
    remedy = f"resume from {whole}, which is complete" if whole else "start again: no checkpoint is complete yet"
    why = " ".join(str(error).split())[:200]
    return f"{directory}: the checkpoint could not be written ({why}). Make room, and {remedy}."


def _clear(directory: Path) -> None:
    """Remove our files of an earlier run from a checkpoint that is written again."""
    for folder in (OPTIMIZER, SHARDS):
        shutil.rmtree(directory / folder, ignore_errors=True)
    for file in (*directory.glob("accel_*"), directory / ckpt.AVERAGED):
        if file.name != ckpt.INCOMPLETE:
            file.unlink(missing_ok=True)
