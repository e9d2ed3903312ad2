"""Choose the checkpoint that a run resumes from, and read it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_accel.checkpoints import format as ckpt
from hf_accel.checkpoints.background import SHARDS
from hf_accel.clock import CONTINUOUS
from hf_accel.host.view import TrainerView
from hf_accel.technique import Technique

logger = logging.get_logger(__name__)

Found = dict[str, list[tuple[Technique, Any]]]
"""Techniques and their states in a checkpoint, by scope."""


def checkpoint_to_resume(resume: str | bool | None, output_dir: str, *, allow_changes: bool) -> str | None:
    """Return the checkpoint to resume from: the given one, or the newest complete one.

    Trainer's files in a given one may have been edited if it holds no technique, or with ``allow_changes``.
    """
    if not resume:
        return None
    if isinstance(resume, str | os.PathLike):
        if not Path(resume).is_dir():
            raise ckpt.CheckpointError(f"Can't find a valid checkpoint at {resume}. Name a checkpoint-N directory.")
        if (fault := ckpt.integrity_error(resume)) is not None:
            edited = ckpt.integrity_error(resume, ours_only=True) is None
            if not (edited and (allow_changes or not ckpt.load_state(resume, ckpt.STATE)["techniques"])):
                whole, _ = ckpt.newest_complete(Path(resume).parent)
                remedy = f"Resume from {whole}" if whole else "There is no complete checkpoint beside it: start again"
                remedy += ", or set allow_changes=True if you edited it." if edited else "."
                raise ckpt.CheckpointError(f"{resume}: the checkpoint is not complete, {fault}. {remedy}")
            logger.warning(f"{resume}: {fault}. The run resumes from the edited files.")
        return str(resume)
    whole, passed_over = ckpt.newest_complete(output_dir)
    for name, fault in passed_over.items():
        logger.warning(f"{name}: passed over, {fault}.")
    if whole is None:
        raise ckpt.CheckpointError(
            f"No valid checkpoint found in output directory ({output_dir}). Train without resuming first."
        )
    return str(whole)


def checkpoint_to_extend(resume: str | bool | None, output_dir: str, owner: Technique) -> str | None:
    """Return the checkpoint from which to continue a finished run beyond its budget."""
    if not resume:
        raise ValueError(f"{owner!r}: there is no run to continue. Name it by resume_from_checkpoint=.")
    if resume is True or Path(resume, "trainer_state.json").is_file():
        return checkpoint_to_resume(resume, output_dir, allow_changes=False)
    folder = Path(resume)
    whole = [path for path in ckpt.checkpoints(folder) if ckpt.has_state(path) and ckpt.integrity_error(path) is None]
    if not whole:
        raise ckpt.CheckpointError(f"{folder}: there is no complete checkpoint of a run of hf_accel. Name another.")
    # Prefer a checkpoint before the run's cooldown.
    at_peak = (path for path in whole if ckpt.load_state(path, ckpt.STATE).get("rate") == 1.0)
    return str(next(at_peak, whole[0]))


class CheckpointReader:
    """Read the contents of a checkpoint.

    Attributes:
        state: Our state, the same on every rank; almost empty for a plain Trainer's checkpoint.
        state_of_rank: Our state of this rank; empty on another number of ranks.
    """

    def __init__(self, host: TrainerView, checkpoint: str):
        self.host, self.checkpoint = host, checkpoint
        has_state = ckpt.has_state(checkpoint)
        self.state: dict[str, Any] = ckpt.load_state(checkpoint, ckpt.STATE) if has_state else {"techniques": []}
        self.state_of_rank = self._read_state_of_rank(self.state.get("world_size", host.args.world_size))
        self._found: Found = {}

    def find_states(self, techniques: list[Technique]) -> None:
        """Match the techniques with their states."""
        there, here = self.state["techniques"], [repr(technique) for technique in techniques]
        for scope, states in (("global", self.state.get("states", [])), ("rank", self.state_of_rank.get("states", []))):
            remaining = list(zip(there, states, strict=False))
            for name, technique in zip(here, techniques, strict=True):
                match = next((pair for pair in remaining if pair[0] == name), None)
                if match is not None:
                    remaining.remove(match)
                    self._found.setdefault(scope, []).append((technique, match[1]))

    def _read_state_of_rank(self, world_size: int) -> dict[str, Any]:
        """Return the states of this rank, or nothing on another number of ranks."""
        host, here = self.host, self.host.args.world_size
        if world_size != here and host.is_deepspeed_enabled:
            raise ckpt.CheckpointError(
                f"{self.checkpoint}: DeepSpeed wrote it on {world_size} ranks, its optimizer in as many parts, and "
                f"here are {here}. Resume on {world_size}, or convert it with DeepSpeed's ds_to_universal.py."
            )
        if world_size != here and list(Path(self.checkpoint).glob("accel_rank*.json")):
            logger.warning(
                f"{self.checkpoint}: written on {world_size} ranks; what techniques kept for each of them is left "
                "behind."
            )
        rank = f"accel_rank{host.args.process_index}"
        own = world_size == here and Path(self.checkpoint, f"{rank}.json").is_file()
        return ckpt.load_state(self.checkpoint, rank) if own else {}

    def state_of(self, technique: Technique) -> Any:
        """Return the global state of a technique, or None."""
        return next((state for owner, state in self._found.get("global", ()) if owner is technique), None)

    def restore_techniques(self) -> None:
        """Give the techniques their states; after their ``on_train_begin``."""
        for scope, pairs in self._found.items():
            for technique, state in pairs:
                technique.load_state_dict(scope, state)  # type: ignore[arg-type]


class Heartbeat:
    """Keep the spent seconds and joules in a file of the output directory, in case the run is killed."""

    def __init__(self, output_dir: str, run_id: str):
        self.path, self.run_id = Path(output_dir, "accel_heartbeat.json"), run_id

    def read(self) -> dict[str, float]:
        """Return the amounts that the run had spent when it last wrote."""
        try:
            beat = json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return {unit: beat[unit] for unit in CONTINUOUS} if beat["run_id"] == self.run_id else {}

    def write(self, seconds: float, joules: float) -> None:
        """Write the amounts that the run has spent."""
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"run_id": self.run_id, "seconds": seconds, "joules": joules}))
        scratch.replace(self.path)


def load_renamed_weights(host: TrainerView, checkpoint: Any, load_result: Any) -> Any:
    """Read the weights of models (ViT) with saved names of earlier versions, which Trainer does not translate back."""
    if load_result.missing_keys and load_result.unexpected_keys and isinstance(host.model, PreTrainedModel):
        saved = type(host.model).from_pretrained(checkpoint)
        return host.model.load_state_dict(saved.state_dict(), strict=False)
    return load_result


@contextlib.contextmanager
def reading_shards(host: TrainerView, checkpoint: str | None) -> Iterator[None]:
    """Let accelerate read shards if shards were written, whatever format it writes."""
    plugin = host.accelerator.state.fsdp_plugin if host.is_fsdp_enabled else None
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
