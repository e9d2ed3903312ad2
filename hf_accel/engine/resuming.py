"""Checkpoints that are whole or not there, and runs that go on from them bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from hf_accel import weights
from hf_accel.checkpoints import format as ckpt
from hf_accel.clock import CONTINUOUS
from hf_accel.engine import batch_norm
from hf_accel.engine.saving import Saving, clear
from hf_accel.technique import Technique

logger = logging.get_logger(__name__)


class Resuming(Saving):
    """Answers Trainer where it saves checkpoints and goes on from them."""

    def _save_checkpoint(self, model, trial):
        self.finish_saving()
        began = self.clock.seconds
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir, f"checkpoint-{self.state.global_step}")
        with self.stopwatch.charge("saving"):
            self._flush_observations()
            self.clock.spent["tokens"] += self._count_tokens()
            try:
                self._write_checkpoint(model, trial, run_dir, directory)
            except (OSError, SafetensorError, RuntimeError) as error:
                self._parts = None
                raise ckpt.CheckpointError(self._not_written(directory, error)) from error
        if self._writing is None:
            self.saving_seconds = self.clock.seconds - began

    def _write_checkpoint(self, model: Any, trial: Any, run_dir: str, directory: Path) -> None:
        began = self.clock.seconds
        if self.args.should_save:
            ckpt.mark_incomplete(directory)
            clear(directory)
        self.accelerator.wait_for_everyone()
        self._begin_parts()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # rotates nothing: the new checkpoint is not complete yet
        finally:
            self.args.save_total_limit = limit
        self._save_state(directory)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint

        def complete() -> None:
            ckpt.mark_complete(directory)
            rotate_checkpoints(run_dir, limit, best, use_mtime=True)

        if self._parts is not None:
            future = self._finish_in_background(complete)
            future.add_done_callback(lambda future: self._say_at_once(directory, *future.result()))
            self._writing = directory, began, future
        elif self.args.should_save:
            complete()
            self._push_complete(directory)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is whole; raise where it could not be written."""
        if self._writing is None:
            return
        (directory, began, future), self._writing = self._writing, None
        with self.stopwatch.charge("saving"):
            error, ended = future.result()
        if error is not None:
            raise ckpt.CheckpointError(self._not_written(directory, error))
        self.saving_seconds = ended - began
        self._push_complete(directory)

    def _say_at_once(self, directory: Path, error: str | None, ended: float) -> None:
        """Log what went wrong; it is raised where all ranks meet, at the next checkpoint or the end of the run."""
        if error is not None and self.args.should_save:
            logger.error(self._not_written(directory, error))

    def _push_complete(self, directory: Path) -> None:
        if self.args.should_save and self.args.push_to_hub:
            self._push_from_checkpoint(str(directory))

    def _not_written(self, directory: Path, error: Exception | str) -> str:
        """The sentence for a checkpoint that a full disk, say, has kept from being written."""
        whole, _ = ckpt.newest_complete(directory.parent)
        remedy = f"resume from {whole}, which is whole" if whole else "start anew: there is no whole one yet"
        why = " ".join(str(error).split())[:200]
        return f"{directory}: the checkpoint could not be written ({why}). Make room, and {remedy}."

    def _averages(self) -> dict[str, Tensor] | None:
        """This rank's part of the averages, weights and their statistics; None while there are none."""
        owner = self._owners["averaging"]
        averages = owner.averaging() if owner is not None else None
        return averages if averages is None else averages | batch_norm.statistics(self, averages)

    def _push_from_checkpoint(self, checkpoint_folder):
        if Path(checkpoint_folder, ckpt.INCOMPLETE).exists():
            return  # Trainer asks before ours is written
        self._write_run_metadata(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_state(self, directory: Path) -> None:
        if (averages := self._averages()) is not None:
            averages = weights.gather(self.model, averages)
        states = {scope: [t.state_dict(scope) for t in self.techniques] for scope in ("global", "rank")}
        if self.args.should_save:
            if averages is not None:
                self._write(ckpt.save_averaged, directory, averages)
            state: dict[str, Any] = {
                "run_id": self.run_id,
                "world_size": self.args.world_size,
                "clock": self.clock.state_dict(),
                "techniques": [repr(t) for t in self.techniques],
                "states": states["global"],
                "skipped_steps": self._skipped_steps,
                "micro_batch_size": self.micro_batch_size,
                "rate": self._share_of_peak(),
                "continuation_point": self.continuation_point,
            }
            if self.stream is not None:
                state["stream"] = self.stream.state_dict()
            self._write(ckpt.save_state, directory, ckpt.STATE, state)
            self._write_run_metadata(directory)
        if any(states["rank"]):
            own = f"accel_rank{self.args.process_index}"
            self._write(ckpt.save_state, directory, own, {"states": states["rank"]})

    def _checkpoint_to_resume(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on from: the given one, or the newest whole one."""
        owner = self._owners["budget"]
        if owner is not None and owner.extends_previous_run():
            if not resume:
                raise ValueError(f"{owner!r}: there is no run to go on with. Name it by resume_from_checkpoint=.")
            if resume is not True and not Path(resume, "trainer_state.json").is_file():
                return self._checkpoint_of_run(Path(resume))
        if not resume:
            return None
        if isinstance(resume, str | os.PathLike):
            if not Path(resume).is_dir():
                raise ckpt.CheckpointError(f"{resume}: there is no checkpoint. Name a checkpoint-N directory.")
            if (fault := ckpt.integrity_error(resume)) is not None:
                whole, _ = ckpt.newest_complete(Path(resume).parent)
                remedy = f"Resume from {whole}." if whole else "There is no whole checkpoint beside it: start anew."
                raise ckpt.CheckpointError(f"{resume}: the checkpoint is not whole, {fault}. {remedy}")
            return str(resume)
        whole, passed_over = ckpt.newest_complete(self.args.output_dir)
        for name, fault in passed_over.items():
            logger.warning(f"{name}: passed over, {fault}.")
        if whole is None:
            raise ckpt.CheckpointError(
                f"{self.args.output_dir}: there is no whole checkpoint to resume from. Train without resuming first."
            )
        return str(whole)

    def _checkpoint_of_run(self, folder: Path) -> str:
        """Where to leave a run that ended: the newest whole checkpoint at the peak of its learning rate, before it
        cooled down; without one, the newest."""
        whole = [
            path for path in ckpt.checkpoints(folder) if ckpt.has_state(path) and ckpt.integrity_error(path) is None
        ]
        if not whole:
            raise ckpt.CheckpointError(f"{folder}: there is no whole checkpoint of a run of hf_accel. Name another.")
        at_peak = (path for path in whole if ckpt.load_state(path, ckpt.STATE).get("rate") == 1.0)
        return str(next(at_peak, whole[0]))

    def _read_checkpoint(self, checkpoint: str) -> dict[str, Any]:
        """Our state in a checkpoint, after a check that it is of the same techniques."""
        state: dict[str, Any] = (
            ckpt.load_state(checkpoint, ckpt.STATE) if ckpt.has_state(checkpoint) else {"techniques": []}
        )
        here, there = [repr(t) for t in self.techniques], state["techniques"]
        owner = self._owners["budget"]
        own = Path(checkpoint).resolve().parent == Path(self.args.output_dir).resolve()
        extends_previous_run = owner is not None and owner.extends_previous_run() and not (own and repr(owner) in there)
        same = self._without_budget(here) == self._without_budget(there) if extends_previous_run else here == there
        if not same and not self.allow_changes:
            raise ckpt.CheckpointError(
                f"{checkpoint}: it was written with techniques [{', '.join(there)}], this run has [{', '.join(here)}]. "
                "Use the same, or allow_changes=True."
            )
        ranked = self._state_of_rank(checkpoint, state.get("world_size", self.args.world_size))
        found: dict[str, list[tuple[Technique, Any]]] = {}
        for scope, states in (("global", state.get("states", [])), ("rank", ranked.get("states", []))):
            remaining = list(zip(there, states, strict=False))
            for name, technique in zip(here, self.techniques, strict=True):
                match = next((pair for pair in remaining if pair[0] == name), None)
                if match is not None:
                    remaining.remove(match)
                    found.setdefault(scope, []).append((technique, match[1]))
        state["found"] = found
        if extends_previous_run:
            if own:
                raise ckpt.CheckpointError(
                    f"{checkpoint}: lies in output_dir, where the run that goes on with it would mix with it. "
                    "Choose another output_dir."
                )
            self._continue_run(checkpoint, state)
        elif "clock" in state:
            self.run_id, self.continuation_point = state["run_id"], state.get("continuation_point")
            if owner is not None and owner.extends_previous_run():
                self.clock.limits = state["clock"]["limits"]  # of a run that went on, and was interrupted
            self._skipped_steps = state["skipped_steps"]
            if self.requested_micro_batch_size == "auto":
                self.micro_batch_size = state["micro_batch_size"]
            self.clock.load_state_dict(state["clock"])
            for unit, spent in self._heartbeat().items():
                self.clock.spent[unit] = max(self.clock.spent[unit], spent)
        return state

    def _continue_run(self, checkpoint: str, state: Mapping[str, Any]) -> None:
        """Another run begins where that of the checkpoint was: with what it has spent, and more to spend."""
        if state.get("rate") is None:
            raise ckpt.CheckpointError(
                f"{checkpoint}: what was spent, or at which learning rate, is not known. Name one of a budgeted run."
            )
        further = self.clock.limits
        self.clock.limits = {unit: state["clock"][unit] + amount for unit, amount in further.items()}
        self.clock.load_state_dict(state["clock"])
        self.continuation_point = [self.clock.progress, state["rate"]]
        self._skipped_steps = state["skipped_steps"]

    def _without_budget(self, techniques: list[str]) -> list[str]:
        """Techniques, as they are written, without what owns the budget."""
        owner = type(self._owners["budget"]).__name__
        return [technique for technique in techniques if not technique.startswith(f"{owner}(")]

    def _share_of_peak(self) -> float | None:
        """The present learning rate over its peak; None where it does not follow the clock."""
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        peak = getattr(scheduler, "base_lrs", [0.0])[0]
        return scheduler.get_last_lr()[0] / peak if self.paced and peak else None

    def _state_of_rank(self, checkpoint: str, world_size: int) -> dict[str, Any]:
        """What the techniques said for this rank; nothing on another number of ranks."""
        here = self.args.world_size
        if world_size != here and self.is_deepspeed_enabled:
            raise ckpt.CheckpointError(
                f"{checkpoint}: DeepSpeed wrote it on {world_size} ranks, its optimizer in as many parts, and here are "
                f"{here}. Resume on {world_size}, or convert it with DeepSpeed's ds_to_universal.py."
            )
        if world_size != here and list(Path(checkpoint).glob("accel_rank*.json")):
            logger.warning(
                f"{checkpoint}: written on {world_size} ranks; what techniques kept for each of them is left behind."
            )
        rank = f"accel_rank{self.args.process_index}"
        own = world_size == here and Path(checkpoint, f"{rank}.json").is_file()
        return ckpt.load_state(checkpoint, rank) if own else {}

    @property
    def resumed(self) -> bool:
        """Whether the run began in an earlier process."""
        return self._resumed is not None

    def resumed_state(self, technique: Technique) -> Any:
        """What a technique's ``state_dict("global")`` gave for the checkpoint that the run goes on from, before it is
        loaded; None where there is none."""
        pairs = (self._resumed or {}).get("found", {}).get("global", ())
        return next((state for owner, state in pairs if owner is technique), None)

    def restore_techniques(self) -> None:
        """Give the techniques their state; after their ``on_train_begin``."""
        for scope, pairs in (self._resumed or {}).get("found", {}).items():
            for technique, state in pairs:
                technique.load_state_dict(scope, state)

    def _heartbeat_path(self) -> Path:
        return Path(self.args.output_dir, "accel_heartbeat.json")

    def _heartbeat(self) -> dict[str, float]:
        """Seconds and joules that a run which was killed had spent when last heard of."""
        try:
            beat = json.loads(self._heartbeat_path().read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return {unit: beat[unit] for unit in CONTINUOUS} if beat["run_id"] == self.run_id else {}

    def beat(self) -> None:
        """Write down the seconds and joules spent, for a run that is killed before its next checkpoint."""
        spent = {"seconds": self.clock.seconds, "joules": self.clock.spent["joules"]}
        scratch = self._heartbeat_path().with_suffix(".tmp")
        scratch.write_text(json.dumps({"run_id": self.run_id, **spent}))
        scratch.replace(self._heartbeat_path())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._loaded_from = resume_from_checkpoint
        with self._reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        if load_result.missing_keys and load_result.unexpected_keys and isinstance(self.model, PreTrainedModel):
            # Some models (ViT) are saved under the names of earlier versions, which Trainer does not translate back.
            saved = type(self.model).from_pretrained(self._loaded_from)
            load_result = self.model.load_state_dict(saved.state_dict(), strict=False)
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self):
        self._loaded_from = self.state.best_model_checkpoint
        with self._reading(self._loaded_from):
            super()._load_best_model()
        averages = ckpt.load_averaged(str(self.state.best_model_checkpoint))
        if averages is not None and self._owners["averaging"] is not None:
            weights.swap(self.model, weights.scatter(self.model, averages))

    def _write_run_metadata(self, directory: str | Path) -> None:
        """Write the recipe, and the receipt where there is one, beside a saved model."""
        if not self.args.should_save:
            return
        self.recipe.of_run(self._explicit_args, self.techniques).save(Path(directory, "recipe.yaml"))
        if self.receipt is not None:
            self.receipt.save(Path(directory, "receipt.json"))
