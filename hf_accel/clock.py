"""The one clock: progress in [0, 1] is what was spent over what may be spent.

    progress = max over units u of spent_u / limit_u

What is spent before the first update, on a search of the learning rate for example, is set aside: progress begins after
it, and the limits stay.

Everything that depends on "when" asks the clock; only a budget speaks in units.  Seconds run from the entry into
``train()`` and include evaluation and saving; what the end of the run will cost (`Clock.reserve`) is kept back, so that
the learning rate reaches its end when the last update is done and the run ends on time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

UNITS = ("steps", "epochs", "samples", "tokens", "seconds")

_NAMES = {
    "steps": ("step", "steps"),
    "epochs": ("ep", "epoch", "epochs"),
    "samples": ("sample", "samples", "sp"),
    "tokens": ("tok", "token", "tokens"),
    "seconds": ("s", "sec", "second", "seconds"),
}
_SECONDS = {"min": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400}
_SCALES = {name: (unit, 1.0) for unit, names in _NAMES.items() for name in names} | {
    name: ("seconds", float(scale)) for name, scale in (_SECONDS | {"days": 86400}).items()
}


def parse_budget(text: str) -> tuple[str, float]:
    """The unit and the amount of a budget such as ``"30min"``, ``"1h 30min"``, ``"500steps"`` or ``"1e9tok"``."""
    parts = re.findall(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", text.lower())
    if not parts or re.sub(r"\s", "", text.lower()) != "".join(number + unit for number, unit in parts):
        raise ValueError(f"Budget({text!r}): not an amount with a unit. Write, for example, '30min' or '500steps'.")
    amounts: dict[str, float] = {}
    for number, name in parts:
        if name not in _SCALES:
            raise ValueError(
                f"Budget({text!r}): there is no unit {name!r}. Use s, min, h, d, steps, epochs, samples or tok."
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
    set_aside: dict[str, float] = field(default_factory=dict)
    """Of the limits, what was for other things than training, before the first update.  ``spent`` holds the seconds of
    it, nothing else."""
    progress: float = 0.0
    done: bool = False
    """Whether the budget is spent: no further update is made."""
    step_seconds: float = 0.0
    """Seconds of a step, of about the last ten; 0 before the first."""
    _started: float = 0.0
    _earlier: float = 0.0
    _step_began: float | None = None

    def start(self) -> None:
        """Begin to count seconds, after those of earlier parts of the run."""
        self._started = self.now()
        self._earlier = self.spent["seconds"]
        self._step_began = None

    @property
    def seconds(self) -> float:
        """Seconds spent until this moment."""
        return self._earlier + self.now() - self._started

    def step_begins(self) -> None:
        """Mark the start of a step, so that its duration is known when the next one is considered."""
        self._step_began = self.now()

    def advance(self, *, steps: int = 1, samples: float = 0, tokens: float = 0, epochs: float | None = None) -> None:
        """Count one step; ``epochs`` is the position in the data, not an increment."""
        spent = self.spent
        spent["steps"] += steps
        spent["samples"] += samples
        spent["tokens"] += tokens
        if epochs is not None:
            spent["epochs"] = epochs
        spent["seconds"] = self.seconds
        if self._step_began is not None:
            duration = self.now() - self._step_began
            # The recent past predicts the next step: about the last ten.
            self.step_seconds += (duration - self.step_seconds) * (0.1 if self.step_seconds else 1.0)
        self._update()

    def _update(self) -> None:
        shares = [self._share(u) for u in self.limits if u != "seconds"]
        done = any(share >= 1.0 for share in shares)
        if "seconds" in self.limits:
            available = self.limits["seconds"] - self.reserve
            late = float(self.spent["seconds"] + self.step_seconds > available)
            seconds, late = self.share([self._share("seconds", self.reserve), late])
            shares.append(seconds)
            done |= bool(late)
        self.done = done
        # Progress never goes back, although the reserve may shrink.
        self.progress = 1.0 if done else max(self.progress, min(max(shares, default=0.0), 1.0))

    def _share(self, unit: str, reserve: float = 0.0) -> float:
        """What was spent of one unit for training, over what may be."""
        aside = self.set_aside.get(unit, 0.0)
        spent = self.spent[unit] - (aside if unit == "seconds" else 0.0)
        return spent / max(self.limits[unit] - reserve - aside, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, and of what."""
        return {
            **self.spent,
            "progress": self.progress,
            "limits": dict(self.limits),
            "set_aside": dict(self.set_aside),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was spent; under other limits, it is another share of these."""
        self.spent = {unit: float(state[unit]) for unit in UNITS}
        self.set_aside = dict(state.get("set_aside", {}))
        share = max(map(self._share, self.limits), default=0.0)
        self.progress = float(state["progress"]) if state["limits"] == dict(self.limits) else min(share, 1.0)
        self.done = self.progress >= 1.0
