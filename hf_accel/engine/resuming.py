"""Continues the clock and the schedule of an earlier run: of one that was interrupted, or beyond one that ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_accel.checkpoints.format import CheckpointError
from hf_accel.checkpoints.reader import CheckpointReader
from hf_accel.engine.meter import Meter
from hf_accel.engine.optimization import Optimization
from hf_accel.engine.roster import Roster


def check(reader: CheckpointReader, roster: Roster, output_dir: str, *, allow_changes: bool) -> bool:
    """Whether the run goes beyond that of the checkpoint; raises where it has other techniques."""
    checkpoint, there = reader.checkpoint, reader.state["techniques"]
    here = [repr(technique) for technique in roster.techniques]
    owner = roster.owner("budget")
    own = Path(checkpoint).resolve().parent == Path(output_dir).resolve()
    extends = owner is not None and owner.extends_previous_run() and not (own and repr(owner) in there)
    same = _without_budget(here, roster) == _without_budget(there, roster) if extends else here == there
    if not same and not allow_changes:
        raise CheckpointError(
            f"{checkpoint}: it was written with techniques [{', '.join(there)}], this run has [{', '.join(here)}]. "
            "Use the same, or allow_changes=True."
        )
    if extends and own:
        raise CheckpointError(
            f"{checkpoint}: lies in output_dir, where the run that continues it would mix with it. "
            "Choose another output_dir."
        )
    return extends


def _without_budget(techniques: list[str], roster: Roster) -> list[str]:
    """Techniques, as they are written, without the owner of the budget."""
    owner = type(roster.owner("budget")).__name__
    return [technique for technique in techniques if not technique.startswith(f"{owner}(")]


def continue_run(
    reader: CheckpointReader,
    roster: Roster,
    meter: Meter,
    optimization: Optimization,
    heartbeat: Mapping[str, float],
) -> None:
    """Continue a run that was interrupted; ``heartbeat`` is what it had spent when it last wrote."""
    state, clock, owner = reader.state, meter.clock, roster.owner("budget")
    optimization.continuation_point = state.get("continuation_point")
    if owner is not None and owner.extends_previous_run():
        clock.limits = state["clock"]["limits"]
    meter.skipped_steps = state["skipped_steps"]
    clock.load_state_dict(state["clock"])
    for unit, spent in heartbeat.items():
        clock.spent[unit] = max(clock.spent[unit], spent)


def extend_run(reader: CheckpointReader, meter: Meter, optimization: Optimization) -> None:
    """Begin another run where that of the checkpoint was: with what it has spent, and more to spend."""
    state, clock = reader.state, meter.clock
    if state.get("rate") is None:
        raise CheckpointError(
            f"{reader.checkpoint}: what was spent, or at which learning rate, is not known. Name one of a budgeted run."
        )
    clock.limits = {unit: state["clock"][unit] + amount for unit, amount in clock.limits.items()}
    clock.load_state_dict(state["clock"])
    optimization.continuation_point = [clock.progress, state["rate"]]
    meter.skipped_steps = state["skipped_steps"]
