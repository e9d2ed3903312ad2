"""Measure the cost of a run: the clock, the stopwatch, and the tokens, operations and joules of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_accel import host as hosts
from hf_accel.clock import Clock
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView
from hf_accel.meters.energy import EnergyMeter
from hf_accel.meters.flops import FlopMeter
from hf_accel.receipt import Receipt, Stopwatch, peak_memory_bytes
from hf_accel.technique import Technique

Result = TypeVar("Result")


def gauges_for(limits: Collection[str], args: Any) -> dict[str, Any]:
    """Return gauges for the limited units that are measured on purpose only: operations and energy."""
    gauges: dict[str, Any] = {}
    if "flops" in limits:
        gauges["flops"] = FlopMeter()
    if "joules" in limits:
        gauges["joules"] = EnergyMeter(args.device, machine=args.local_process_index == 0)
    return gauges


class Meter:
    """Count the cost of one call of ``train()``.

    Args:
        clock: Clock of the run.
        gauges: Gauges of operations (``flops``) and energy (``joules``), as `gauges_for` makes them.
    """

    def __init__(self, clock: Clock, gauges: Mapping[str, Any], roster: Roster, ranks: Ranks):
        self.clock, self.gauges, self.roster, self.ranks = clock, gauges, roster, ranks
        self.stopwatch = Stopwatch()
        self.skipped_steps = 0
        self.samples = 0.0
        """Examples of the current step, over all ranks."""
        self.positions = 0
        """Size of the current step's batches on this rank, including padding."""
        self.evaluation_seconds = self.saving_seconds = 0.0
        self._earlier_tokens: Tensor | int = 0
        self._step_tokens: Tensor | int = 0
        self._step_flops = (0.0, 0.0)
        self._joules_read = 0.0

    def charge(self, technique: Technique) -> AbstractContextManager:
        """Charge the time that is spent inside to a technique."""
        return self.stopwatch.charge(self.roster.name_of(technique))

    def start(self, *, resumed: bool, began: float | None) -> None:
        """Begin to count; exclude the seconds before ``train()`` from progress, if they count from ``began``."""
        if began is None:
            self.clock.start()
        else:
            self.clock.spent["seconds"] = 0.0
            self.clock.start(ago=max(time.time() - began, 0.0))
            if not resumed:
                self.clock.excluded_cost = {"seconds": self.clock.seconds}
        if "joules" in self.gauges:
            self._joules_read = self.gauges["joules"]()

    def refuse_uncounted(self, **counts: Any) -> None:
        """Raise ValueError if batches do not tell an amount that is limited."""
        hosts.refuse_uncounted(self.roster.owner("budget"), self.clock.limits, **counts)

    def begin_step(self, samples: float, positions: int, tokens: Tensor | int) -> None:
        """Record the size of a new step."""
        self.samples, self.positions = samples, positions
        self._earlier_tokens = self._earlier_tokens + self._step_tokens
        self._step_tokens = tokens

    def repeat_step(self, tokens: Tensor | int) -> None:
        """Record the tokens of a repeated step, so that they count once."""
        self._step_tokens = tokens

    def count(self, model: nn.Module, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """Return the result of ``run``, which computes a model over inputs; count its operations if limited."""
        if (gauge := self.gauges.get("flops")) is None:
            return run()
        varied = (needed, *(technique.flops_key() for technique in self.roster.techniques))
        result, flops = gauge.measure(model, inputs, run, varied)
        executed, of_model = self._step_flops
        self._step_flops = (executed + flops.executed, of_model + flops.model * needed)
        return result

    def end_step(self, *, skipped: bool, epochs: float) -> None:
        """Advance the clock by the cost of the step; without an update, it is no step."""
        self.skipped_steps += skipped
        tokens = self.read_tokens() if "tokens" in self.clock.limits else 0.0
        flops, model_flops, joules = self._read() if self.gauges else (0.0, 0.0, 0.0)
        self.clock.model_flops += model_flops
        self.clock.advance(
            steps=0 if skipped else 1, samples=self.samples, tokens=tokens, flops=flops, joules=joules, epochs=epochs
        )

    def count_tokens(self) -> None:
        """Add the tokens since the last count to the clock."""
        self.clock.spent["tokens"] += self.read_tokens()

    def count_energy(self) -> None:
        """Add the energy since the last step to the clock."""
        if "joules" in self.gauges:
            self.clock.spent["joules"] += self._read()[2]

    def first_step_cost(self) -> dict[str, float]:
        """Return the cost of the first step until its update, in the units that are known only afterward."""
        joules = self.gauges["joules"]() - self._joules_read if "joules" in self.gauges else 0.0
        local = [float(self._earlier_tokens + self._step_tokens), self._step_flops[0], joules]
        tokens, flops, joules = self.ranks.sum(local)
        earlier = self.clock.spent["joules"]  # before the first step
        return {"tokens": tokens, "flops": flops, "joules": earlier + joules, "seconds": self.clock.seconds}

    def read_tokens(self) -> float:
        """Return the tokens since the last call, over all ranks."""
        tokens = float(self._earlier_tokens + self._step_tokens)
        self._earlier_tokens = self._step_tokens = 0
        return self.ranks.sum([tokens])[0]

    def _read(self) -> list[float]:
        """Return operations, those that the model needs, and joules since the last call, over all ranks."""
        joules = self.gauges["joules"]() if "joules" in self.gauges else 0.0
        local = [*self._step_flops, joules - self._joules_read]
        self._step_flops, self._joules_read = (0.0, 0.0), joules
        return self.ranks.sum(local)


def receipt_of(
    host: TrainerView, roster: Roster, meter: Meter, learning_rate: float, reports: Sequence[Mapping[str, Any]]
) -> Receipt:
    """Return the receipt of a finished run, with its last learning rate and the techniques' reports."""
    clock, args, counts_flops = meter.clock, host.args, "flops" in meter.gauges
    seconds = dict(meter.stopwatch.seconds)
    return Receipt(
        seconds=seconds,
        wall_seconds=clock.seconds,
        steps=host.state.global_step - meter.skipped_steps,
        skipped_steps=meter.skipped_steps,
        samples=clock.spent["samples"],
        tokens=clock.spent["tokens"],
        flops=host.state.total_flos,
        executed_flops=clock.spent["flops"] if counts_flops else None,
        model_flops=clock.model_flops if counts_flops else None,
        joules=clock.spent["joules"] if "joules" in meter.gauges else None,
        peak_memory_bytes=peak_memory_bytes(args.device),
        world_size=args.world_size,
        device=str(args.device),
        final_learning_rate=learning_rate,
        progress=clock.progress,
        budget=dict(clock.limits),
        techniques=[
            {"technique": repr(technique), "seconds": seconds.get(name, 0.0), "report": dict(report)}
            for technique, name, report in zip(roster.techniques, roster.names, reports, strict=True)
        ],
    )
