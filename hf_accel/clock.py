"""Measure progress in [0, 1], the spent share of the limits.

    progress = max over units u of spent_u / limit_u

Costs before the first update, of a learning-rate search for example, are set aside: progress begins after them, and the
limits stay the same.

Everything that depends on "when" asks the clock; only a budget has units.  Seconds run from the entry into ``train()``
and include evaluation and saving.  A reserve (`Clock.reserve`) is kept for the cost of the end of the run.  So the
learning rate reaches its end at the last update, and the run ends on time.  Energy is counted in the same way.

The cost of a step in seconds, tokens, operations and joules is known only after it.  In these units a run stays below
the limit: it ends when another step, as expensive as earlier ones, would not fit.  The duration of the next step is
predicted from the second step on, because the first also loads and compiles.  Another step follows the first, unless
the limit is already reached.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

UNITS = ("steps", "epochs", "samples", "tokens", "seconds", "flops", "joules")

CONTINUOUS = ("seconds", "joules")
"""Units that are spent at all times, not by steps alone."""

KNOWN_AFTERWARDS = ("tokens", "flops", *CONTINUOUS)
"""Units with a cost per step that is known only after the step."""

_NAMES = {
    "steps": ("step", "steps"),
    "epochs": ("ep", "epoch", "epochs"),
    "samples": ("sample", "samples", "sp"),
    "tokens": ("tok", "token", "tokens"),
    "seconds": ("s", "sec", "second", "seconds"),
}
_SECONDS = {"min": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400}
_PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_SCALES = (
    {name: (unit, 1.0) for unit, names in _NAMES.items() for name in names}
    | {name: ("seconds", float(scale)) for name, scale in (_SECONDS | {"days": 86400}).items()}
    | {f"{prefix}{name}": ("flops", scale) for prefix, scale in _PREFIXES.items() for name in ("flop", "flops")}
    | {f"{prefix}{name}": ("joules", scale) for prefix, scale in _PREFIXES.items() for name in ("j", "joule", "joules")}
    | {f"{prefix}wh": ("joules", 3600 * scale) for prefix, scale in _PREFIXES.items()}
)


def parse_budget(text: str) -> tuple[str, float]:
    """Return the unit and the amount of a budget: ``"30min"``, ``"1h 30min"``, ``"500steps"``, ``"50kJ"``."""
    parts = re.findall(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", text.lower())
    if not parts or re.sub(r"\s", "", text.lower()) != "".join(number + unit for number, unit in parts):
        raise ValueError(f"Budget({text!r}): not an amount with a unit. Write, for example, '30min' or '500steps'.")
    amounts: dict[str, float] = {}
    for number, name in parts:
        if name not in _SCALES:
            raise ValueError(
                f"Budget({text!r}): there is no unit {name!r}. "
                "Use s, min, h, d, steps, epochs, samples, tok, flop, J or Wh."
            )
        unit, scale = _SCALES[name]
        try:
            amounts[unit] = amounts.get(unit, 0.0) + float(number) * scale
        except ValueError:
            raise ValueError(f"Budget({text!r}): {number!r} is not a number. Write, for example, '1.5h'.") from None
    if len(amounts) > 1:
        raise ValueError(f"Budget({text!r}): one text has one unit. Give several limits as a list.")
    ((unit, amount),) = amounts.items()
    if not 0 < amount < float("inf"):
        raise ValueError(f"Budget({text!r}): the amount must be > 0. Give a positive amount.")
    return unit, amount


def passes(before: float, now: float, every: float) -> bool:
    """Return whether a multiple of ``every`` lies in (before, now]; all three are shares of a run."""
    return math.floor(now / every + 1e-9) > math.floor(before / every + 1e-9)


@dataclass(frozen=True)
class Limits:
    """The limits of a run."""

    amounts: Mapping[str, float]
    """Limit per unit of `UNITS`; the first limit reached ends the run."""
    extends: bool = False
    """True if the amounts are added to those of a finished run, which the run continues."""
    began: float | None = None
    """``time.time()`` from which the seconds count; None: the entry into ``train()``."""


@dataclass
class Clock:
    """The spent amount of each unit, over all ranks and all earlier parts of the run.

    Args:
        limits: Limit per unit of `UNITS`; the first limit reached ends the run.
        now: Seconds of a clock that never goes back.
        share: Gives the values of rank 0 to all ranks, so that they decide alike; called only if seconds count.
    """

    limits: Mapping[str, float]
    now: Callable[[], float] = time.monotonic
    share: Callable[[list[float]], list[float]] = lambda values: values
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    reserve: float = 0.0
    """Seconds reserved for the work after the last update: evaluation and saving."""
    evaluation_seconds: float = 0.0
    """Seconds of the reserve for an evaluation, at the present speed."""
    excluded_cost: dict[str, float] = field(default_factory=dict)
    """Cost of work before the first update, for example a learning-rate search.

    ``spent`` includes it for the `CONTINUOUS` units only.
    """
    model_flops: float = 0.0
    """Spent operations that the model needs, without recomputation."""
    progress: float = 0.0
    done: bool = False
    """True if the budget is spent, so that no further update follows."""
    step_seconds: float = 0.0
    """Seconds of a step, over about the last ten without the first; 0 before it."""
    step_costs: dict[str, float] = field(default_factory=dict)
    """Largest cost of about the last fifty steps, in the other units that are known afterwards."""
    _started: float = 0.0
    _earlier: float = 0.0
    _step_began: float | None = None
    _timed_steps: int = 0

    def start(self, ago: float = 0.0) -> None:
        """Start to count seconds, ``ago`` before this moment, after those of earlier parts of the run."""
        self._started = self.now() - ago
        self._earlier = self.spent["seconds"]
        self._step_began, self._timed_steps = None, 0

    @property
    def seconds(self) -> float:
        """Return the seconds spent until this moment."""
        return self._earlier + self.now() - self._started

    def step_begins(self) -> None:
        """Mark the start of a step, to know its duration when the next one is considered."""
        self._step_began = self.now()

    def advance(
        self,
        *,
        steps: int = 1,
        samples: float = 0,
        tokens: float = 0,
        flops: float = 0,
        joules: float = 0,
        epochs: float | None = None,
    ) -> None:
        """Count one step; ``epochs`` is the position in the data, not an increment."""
        spent = self.spent
        spent["steps"] += steps
        spent["samples"] += samples
        for unit, cost in (("tokens", tokens), ("flops", flops), ("joules", joules)):
            spent[unit] += cost
            self.step_costs[unit] = max(cost, 0.98 * self.step_costs.get(unit, 0.0))
        if epochs is not None:
            spent["epochs"] = epochs
        spent["seconds"] = self.seconds
        if self._step_began is not None:
            duration = self.now() - self._step_began
            self._timed_steps += 1
            # The recent past predicts the next step: about the last ten, but not the first.
            self.step_seconds += (duration - self.step_seconds) * (0.1 if self._timed_steps > 2 else 1.0)
        self._update()

    def can_afford(self, unit: str, amount: float) -> bool:
        """Return whether this amount of a unit can be spent, with the excluded cost and the reserve."""
        aside = 0.0 if unit in CONTINUOUS else self.excluded_cost.get(unit, 0.0)
        return amount + aside <= self.limits[unit] - self._reserved(unit)

    def has_time_for(self, seconds: float) -> bool:
        """Return whether this time, one more step and the reserve fit; the answer is the same on every rank."""
        seconds += self.seconds + self.step_seconds
        joules = self.spent["joules"] / max(self.seconds, 1e-9) * seconds
        amounts = {"seconds": seconds, "joules": joules}
        fits = all(self.can_afford(unit, amount) for unit, amount in amounts.items() if unit in self.limits)
        return bool(self.share([float(fits)])[0])

    def _update(self) -> None:
        shares = {unit: self._share(unit) for unit in self.limits}
        late = {unit: not self._another_fits(unit) for unit in self.limits if unit in KNOWN_AFTERWARDS}
        if measured := [unit for unit in CONTINUOUS if unit in self.limits]:
            # Ranks measure differently.
            values = self.share([*(shares[unit] for unit in measured), *(float(late[unit]) for unit in measured)])
            shares |= dict(zip(measured, values, strict=False))
            late |= dict(zip(measured, map(bool, values[len(measured) :]), strict=True))
        self.done = any(late.values()) or any(share >= 1.0 for share in shares.values())
        # Progress never goes back, although the reserve may shrink.
        self.progress = 1.0 if self.done else max(self.progress, min(max(shares.values(), default=0.0), 1.0))

    def _another_fits(self, unit: str) -> bool:
        step = self.step_costs.get(unit, 0.0)
        if unit == "seconds":
            step = self.step_seconds if self._timed_steps > 1 else 0.0
        return self.can_afford(unit, self.spent[unit] + step)

    def _reserved(self, unit: str) -> float:
        """Return the reserve in one unit; energy is reserved at the mean power of the run so far."""
        if unit == "joules":
            return self.reserve * self.spent["joules"] / max(self.seconds, 1e-9)
        return self.reserve if unit == "seconds" else 0.0

    def _share(self, unit: str) -> float:
        """Return the share of a unit's limit that training has spent."""
        aside = self.excluded_cost.get(unit, 0.0)
        spent = self.spent[unit] - (aside if unit in CONTINUOUS else 0.0)
        return spent / max(self.limits[unit] - self._reserved(unit) - aside, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """Return the spent amounts and the limits."""
        return {
            **self.spent,
            "progress": self.progress,
            "limits": dict(self.limits),
            "excluded_cost": dict(self.excluded_cost),
            "model_flops": self.model_flops,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the spent amounts; under other limits, they are another share."""
        self.spent = {unit: float(state.get(unit, 0.0)) for unit in UNITS}
        self.excluded_cost = dict(state.get("excluded_cost", {}))
        self.model_flops = float(state.get("model_flops", 0.0))
        share = max(map(self._share, self.limits), default=0.0)
        self.progress = float(state["progress"]) if state["limits"] == dict(self.limits) else min(share, 1.0)
        self.done = self.progress >= 1.0
