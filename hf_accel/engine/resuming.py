"""Continue the clock and the schedule of an interrupted run, or extend a finished one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_accel.checkpoints.format import CheckpointError
from hf_accel.checkpoints.reader import CheckpointReader
from hf_accel.engine.meter import Meter
from hf_accel.engine.optimization import Optimization
from hf_accel.engine.roster import Roster


def check(reader: CheckpointReader, roster: Roster, output_dir: str, *, allow_changes: bool) -> bool:
    """Return whether the run extends that of the checkpoint; raise if it has other techniques."""
    checkpoint, there = reader.checkpoint, reader.state["techniques"]
    here = [repr(technique) for technique in roster.techniques]
    owner = roster.owner("budget")
    own = Path(checkpoint).resolve().parent == Path(output_dir).resolve()
    extends = owner is not None and owner.budget().extends and not (own and repr(owner) in there)
    same = _without_budget(here, roster) == _without_budget(there, roster) if extends else here == there
    if not same and not allow_changes:
        raise CheckpointError(
            f"{checkpoint} was written with techniques [{', '.join(there)}], but this run has [{', '.join(here)}]. "
            "Use the same techniques, or set allow_changes=True."
        )
    if extends and own:
        raise CheckpointError(
            f"{checkpoint} lies in output_dir, so the files of the two runs would mix. Choose another output_dir."
        )
    return extends


def _without_budget(techniques: list[str], roster: Roster) -> list[str]:
    """Return the ``repr`` of each technique except the owner of the budget."""
    owner = type(roster.owner("budget")).__name__
    return [technique for technique in techniques if not technique.startswith(f"{owner}(")]


def continue_run(
    reader: CheckpointReader,
    roster: Roster,
    meter: Meter,
    optimization: Optimization,
    heartbeat: Mapping[str, float],
) -> None:
    """Continue an interrupted run; ``heartbeat`` holds its last record of the amounts spent."""
    state, clock, owner = reader.state, meter.clock, roster.owner("budget")
    optimization.continuation_point = state.get("continuation_point")
    if owner is not None and owner.budget().extends:
        clock.limits = state["clock"]["limits"]
    meter.skipped_steps = state["skipped_steps"]
    clock.load_state_dict(state["clock"])
    for unit, spent in heartbeat.items():
        clock.spent[unit] = max(clock.spent[unit], spent)


def extend_run(reader: CheckpointReader, meter: Meter, optimization: Optimization) -> None:
    """Extend the run of the checkpoint: add the new limits to its spent amounts."""
    state, clock = reader.state, meter.clock
    if state.get("rate") is None:
        raise CheckpointError(
            f"{reader.checkpoint} lacks its spent amounts or its learning rate. Name a checkpoint of a budgeted run."
        )
    clock.limits = {unit: state["clock"][unit] + amount for unit, amount in clock.limits.items()}
    clock.load_state_dict(state["clock"])
    optimization.continuation_point = [clock.progress, state["rate"]]
    meter.skipped_steps = state["skipped_steps"]
