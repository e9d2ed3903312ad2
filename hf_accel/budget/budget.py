"""A budget: what the run may spend, in the user's own unit.

People guess ``max_steps``; the job is killed in mid-decay or ends early at a high learning rate.  With a budget the
learning rate and everything else that depends on "when" follow what was spent, and the run ends on time:

    progress = spent / limit,   stop when the next step would not fit

Seconds include compilation, evaluation and saving.

Reference: Li, Yumer and Ramanan (2020), Budgeted training, https://arxiv.org/abs/1905.04753; schedules on wall-clock
time: Izsak et al. (2021), https://arxiv.org/abs/2104.07705.  Departure: any unit, and several limits at once.

When to use: whenever the time, the number of tokens or the number of epochs is given.
When not to use: where runs must be bit-identical on machines of different speed, do not budget seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_accel.clock import UNITS, parse_budget
from hf_accel.technique import Technique


@dataclass(eq=False)
class Budget(Technique):
    """Ends the run when the limit is reached, with everything that follows progress at its end.

    Args:
        limit: An amount with a unit such as ``"30min"``, ``"2h"``, ``"500steps"``, ``"3epochs"``, ``"1e6samples"`` or
            ``"1e9tok"``; or several, of which the first one reached ends the run.
    """

    limit: str | list[str] = "1epoch"
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"limit": "2epochs"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.budget()

    def budget(self) -> Mapping[str, float]:
        """The limits by unit."""
        texts = [self.limit] if isinstance(self.limit, str) else list(self.limit)
        pairs = [parse_budget(text) for text in texts]
        limits = dict(pairs)
        if not pairs or len(limits) < len(pairs):
            raise ValueError(f"{self!r}: each unit may be limited once, and at least one must be. Give other limits.")
        return limits

    def report(self) -> Mapping[str, Any]:
        """The share of the budget that was spent, by unit."""
        clock = self.host_.clock  # type: ignore[union-attr]
        spent = clock.spent | {u: clock.spent[u] + amount for u, amount in clock.set_aside.items() if u != "seconds"}
        return {f"{unit}_share": spent[unit] / limit for unit, limit in self.budget().items()}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """A limit was reached, and none was passed by more than a step."""
        return any(report.get(f"{unit}_share", 0.0) > 0.9 for unit in UNITS)
