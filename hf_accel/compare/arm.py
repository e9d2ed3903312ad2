"""An arm of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_accel.recipe import Recipe


@dataclass
class Arm:
    """One way to train.

    Args:
        name: What tables call it.
        recipe: Its arguments and techniques; arguments that it does not name are the baseline's.
        role: What it is there for.
        of: The candidate that it is a placebo or an ablation of.
        horizon: Share of the nominal budget, of all but the baseline; one of the comparison's horizons.
    """

    name: str
    recipe: Recipe
    role: Literal["baseline", "candidate", "placebo", "ablation", "defaults"] = "candidate"
    of: str | None = None
    horizon: float = 1.0
