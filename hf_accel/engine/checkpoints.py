"""Add the engine's state to Trainer's checkpoints, and resume a run from them."""

from __future__ import annotations

import functools
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_accel import weights
from hf_accel.checkpoints import format as ckpt
from hf_accel.checkpoints import reader as reading
from hf_accel.checkpoints.writer import CheckpointWriter
from hf_accel.engine import resuming
from hf_accel.engine.averages import AveragedWeights
from hf_accel.engine.meter import Meter
from hf_accel.engine.optimization import Optimization
from hf_accel.engine.roster import Roster
from hf_accel.engine.step import StepRunner
from hf_accel.host.view import TrainerView
from hf_accel.technique import Technique


class RunCheckpoints:
    """Write and read the checkpoints of one call of ``train()``.

    Args:
        write_metadata: Write recipe and receipt into a folder.
    """

    def __init__(
        self,
        host: TrainerView,
        roster: Roster,
        meter: Meter,
        optimization: Optimization,
        step: StepRunner,
        averages: AveragedWeights,
        writer: CheckpointWriter,
        *,
        write_metadata: Callable[[Path], None],
    ):
        self.host, self.roster, self.meter = host, roster, meter
        self.optimization, self.step, self.averages, self.writer = optimization, step, averages, writer
        self.write_metadata = write_metadata
        self.run_id = uuid.uuid4().hex
        self._reader: reading.CheckpointReader | None = None
        self._loaded_from: Any = None

    # Writing --------------------------------------------------------------------------------------------------------

    def save(self, trial: Any, plain: Callable[[], Any]) -> None:
        """Write a checkpoint; ``plain`` is Trainer's own method."""
        self.finish()
        run_dir = self.host.get_output_dir(trial=trial)
        directory = Path(run_dir, f"checkpoint-{self.host.state.global_step}")
        clock = self.meter.clock
        with self.meter.stopwatch.charge("saving"):
            self.step.flush_observations()
            self.meter.count_tokens()
            add = functools.partial(self._add_state, directory)
            seconds = self.writer.write(directory, run_dir, plain, add, lambda: clock.seconds)
        if seconds is not None:
            self.meter.saving_seconds = seconds

    def finish(self) -> None:
        """Wait until a checkpoint in progress is complete; raise if it could not be written."""
        if self.writer.is_writing:
            with self.meter.stopwatch.charge("saving"):
                self.meter.saving_seconds = self.writer.finish()

    def _add_state(self, directory: Path) -> None:
        """Write the state that Trainer's checkpoint lacks."""
        args, techniques, put = self.host.args, self.roster.techniques, self.writer.put
        if (averages := self.averages.averages()) is not None:
            averages = weights.gather(self.host.model, averages)
        states = {scope: [t.state_dict(scope) for t in techniques] for scope in ("global", "rank")}
        if args.should_save:
            if averages is not None:
                put(ckpt.save_averaged, directory, averages)
            put(ckpt.save_state, directory, ckpt.STATE, self._state(states["global"]))
            self.write_metadata(directory)
        of_rank: dict[str, Any] = {"states": states["rank"]}
        if (gauge := self.meter.gauges.get("flops")) is not None:
            of_rank["flops"] = gauge.state_dict()
        if any(of_rank["states"]) or len(of_rank) > 1:
            put(ckpt.save_state, directory, f"accel_rank{args.process_index}", of_rank)

    def _state(self, of_techniques: list[Any]) -> dict[str, Any]:
        """Return the state that is the same on every rank."""
        state: dict[str, Any] = {
            "run_id": self.run_id,
            "world_size": self.host.args.world_size,
            "clock": self.meter.clock.state_dict(),
            "techniques": [repr(technique) for technique in self.roster.techniques],
            "states": of_techniques,
            "skipped_steps": self.meter.skipped_steps,
            "micro_batch_size": self.step.micro_batch_size,
            "rate": self.optimization.share_of_peak(),
            "continuation_point": self.optimization.continuation_point,
        }
        if self.step.stream is not None:
            state["stream"] = self.step.stream.state_dict()
        return state

    def push(self, folder: str, plain: Callable[[str], Any]) -> None:
        """Push a checkpoint that is complete; ``plain`` is Trainer's own method."""
        if not Path(folder, ckpt.INCOMPLETE).exists():  # Trainer also asks before our part is written
            self.write_metadata(self.host.args.output_dir)
            plain(folder)

    def beat(self) -> None:
        """Record the seconds and joules spent, in case the run is killed before its next checkpoint."""
        clock = self.meter.clock
        try:
            self._heartbeat().write(clock.seconds, clock.spent["joules"])
        except OSError as error:  # a full disk must not end a run that need not save
            warnings.warn(
                f"{self._heartbeat().path} could not be written: {error}. Free space on the disk.", stacklevel=2
            )

    def _heartbeat(self) -> reading.Heartbeat:
        return reading.Heartbeat(self.host.args.output_dir, self.run_id)

    # Reading --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any] | None:
        """Return our state in the checkpoint of a resumed run, or None if the run is not resumed."""
        return None if self._reader is None else self._reader.state

    def find(self, resume: str | bool | None, *, allow_changes: bool) -> str | None:
        """Return the checkpoint to resume from, or None."""
        owner, output_dir = self.roster.owner("budget"), self.host.args.output_dir
        if owner is not None and owner.budget().extends:
            return reading.checkpoint_to_extend(resume, output_dir, owner)
        return reading.checkpoint_to_resume(resume, output_dir, allow_changes=allow_changes)

    def resume(self, checkpoint: str, *, allow_changes: bool) -> None:
        """Continue the clock of the checkpoint's run, and find the states of the techniques."""
        reader = self._reader = reading.CheckpointReader(self.host, checkpoint)
        extends = resuming.check(reader, self.roster, self.host.args.output_dir, allow_changes=allow_changes)
        reader.find_states(self.roster.techniques)
        gauge = self.meter.gauges.get("flops")
        if gauge is not None and reader.state["techniques"] == [repr(t) for t in self.roster.techniques]:
            gauge.load_state_dict(reader.state_of_rank.get("flops", {}))
        if extends:
            resuming.extend_run(reader, self.meter, self.optimization)
        elif "clock" in reader.state:
            self.run_id = reader.state["run_id"]
            if self.step.halves:
                self.step.micro_batch_size = reader.state["micro_batch_size"]
            resuming.continue_run(reader, self.roster, self.meter, self.optimization, self._heartbeat().read())

    def state_of(self, technique: Technique) -> Any:
        """Return a technique's ``state_dict("global")`` in the checkpoint of a resumed run, or None."""
        return None if self._reader is None else self._reader.state_of(technique)

    def restore_techniques(self) -> None:
        """Load the states of the techniques, after their ``on_train_begin``."""
        if self._reader is not None:
            self._reader.restore_techniques()

    def load_optimizer(self, checkpoint: str | None, plain: Callable[[Any], Any]) -> None:
        """Read optimizer and schedule; ``plain`` is Trainer's own method."""
        with reading.reading_shards(self.host, checkpoint):
            plain(checkpoint)
        state = self.state or {}
        if self.roster.paced and "clock" in state and state["clock"]["limits"] != dict(self.meter.clock.limits):
            self.optimization.rescale_learning_rate()

    def load_weights(self, checkpoint: Any, plain: Callable[[], Any]) -> None:
        """Read the weights of a checkpoint; ``plain`` is Trainer's own method."""
        self._loaded_from = checkpoint
        with reading.reading_shards(self.host, checkpoint):
            plain()

    def check_loaded(self, load_result: Any) -> Any:
        """Return the load result that Trainer reports, after loading weights under their renamed keys."""
        return reading.load_renamed_weights(self.host, self._loaded_from, load_result)

    def load_best_model(self, plain: Callable[[], Any]) -> None:
        """Read the best model, with its averages if it has any; ``plain`` is Trainer's own method."""
        best = self.host.state.best_model_checkpoint
        self.load_weights(best, plain)
        averages = ckpt.load_averaged(str(best))
        if averages is not None and self.roster.owner("averaging") is not None:
            weights.swap(self.host.model, weights.scatter(self.host.model, averages))
