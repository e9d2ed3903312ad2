"""The one clock: progress in [0, 1] is what was spent over what may be spent.

    progress = max over units u of spent_u / limit_u

What is spent before the first update, on a search of the learning rate for example, is set aside: progress begins after
it, and the limits stay.

Everything that depends on "when" asks the clock; only a budget speaks in units.  Seconds run from the entry into
``train()`` and include evaluation and saving; what the end of the run will cost (`Clock.reserve`) is kept back, so that
the learning rate reaches its end when the last update is done and the run ends on time.  Energy is counted likewise.

What a step takes of seconds, tokens, operations and joules is known only after it.  Of these units a run stays below
the limit: it ends when another step, as dear as those before, would not fit.  How long the next step takes is judged
from the second on: the first also loads and compiles, and another follows it unless the limit is reached already.
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
"""Units of which a step takes what is known only after it."""

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
    """The unit and the amount of a budget: ``"30min"``, ``"1h 30min"``, ``"500steps"``, ``"1e9tok"``, ``"50kJ"``."""
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
        raise ValueError(f"Budget({text!r}): one text is one unit. Give several limits as a list.")
    ((unit, amount),) = amounts.items()
    if not 0 < amount < float("inf"):
        raise ValueError(f"Budget({text!r}): the amount must be > 0. Say what may be spent.")
    return unit, amount


def passes(before: float, now: float, every: float) -> bool:
    """Whether a multiple of ``every`` lies after ``before`` and not after ``now``; all three are shares of a run."""
    return math.floor(now / every + 1e-9) > math.floor(before / every + 1e-9)


@dataclass
class Clock:
    """What was spent of each unit, over all ranks and all earlier parts of the run.

    Args:
        limits: What may be spent, per unit of `UNITS`; the first limit reached ends the run.
        now: Seconds of a clock that never goes back.
        share: Gives the value of rank 0 to all ranks, so that they decide alike; only asked where seconds count.
    """

    limits: Mapping[str, float]
    now: Callable[[], float] = time.monotonic
    share: Callable[[list[float]], list[float]] = lambda values: values
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    reserve: float = 0.0
    """Seconds kept back for what follows the last update: evaluation and saving."""
    evaluation_seconds: float = 0.0
    """Of these, those of an evaluation at the present speed."""
    excluded_cost: dict[str, float] = field(default_factory=dict)
    """Of the limits, what was for other things than training, before the first update.  ``spent`` holds it of the
    `CONTINUOUS` units, and of no other."""
    model_flops: float = 0.0
    """Of the operations spent, those that the model needs: without what was computed again."""
    progress: float = 0.0
    done: bool = False
    """Whether the budget is spent: no further update is made."""
    step_seconds: float = 0.0
    """Seconds of a step, of about the last ten without the first; 0 before it."""
    step_costs: dict[str, float] = field(default_factory=dict)
    """What the dearest of about the last fifty steps took, of the other units that are known afterwards."""
    _started: float = 0.0
    _earlier: float = 0.0
    _step_began: float | None = None
    _timed_steps: int = 0

    def start(self, ago: float = 0.0) -> None:
        """Begin to count seconds, ``ago`` before this moment, after those of earlier parts of the run."""
        self._started = self.now() - ago
        self._earlier = self.spent["seconds"]
        self._step_began, self._timed_steps = None, 0

    @property
    def seconds(self) -> float:
        """Seconds spent until this moment."""
        return self._earlier + self.now() - self._started

    def step_begins(self) -> None:
        """Mark the start of a step, so that its duration is known when the next one is considered."""
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
        """Whether so much of one unit can be spent, with what was set aside and what follows the last update."""
        aside = 0.0 if unit in CONTINUOUS else self.excluded_cost.get(unit, 0.0)
        return amount + aside <= self.limits[unit] - self._reserved(unit)

    def has_time_for(self, seconds: float) -> bool:
        """Whether so much time can pass, a step and what follows the last update fit after it; alike on every rank."""
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
        """What the end of the run will take of one unit; of energy, as much a second as the run until now."""
        if unit == "joules":
            return self.reserve * self.spent["joules"] / max(self.seconds, 1e-9)
        return self.reserve if unit == "seconds" else 0.0

    def _share(self, unit: str) -> float:
        """What was spent of one unit for training, over what may be."""
        aside = self.excluded_cost.get(unit, 0.0)
        spent = self.spent[unit] - (aside if unit in CONTINUOUS else 0.0)
        return spent / max(self.limits[unit] - self._reserved(unit) - aside, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, and of what."""
        return {
            **self.spent,
            "progress": self.progress,
            "limits": dict(self.limits),
            "excluded_cost": dict(self.excluded_cost),
            "model_flops": self.model_flops,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was spent; under other limits, it is another share of these."""
        self.spent = {unit: float(state.get(unit, 0.0)) for unit in UNITS}
        self.excluded_cost = dict(state.get("excluded_cost", {}))
        self.model_flops = float(state.get("model_flops", 0.0))
        share = max(map(self._share, self.limits), default=0.0)
        self.progress = float(state["progress"]) if state["limits"] == dict(self.limits) else min(share, 1.0)
        self.done = self.progress >= 1.0
