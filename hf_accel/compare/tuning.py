"""Equal tuning for every arm: the same number of trials, the same moves, the same rule.

A search varies the options that Trainer offers for free, and two of the arm's own:

    peak learning rate                                x 2^(i/2)
    batch size                                        x 2^j
    ``train_sampling_strategy``                       random, group_by_length
    weight decay                                      0, 0.01, 0.1
    beta2 of Adam                                     0.999, 0.98, 0.95
    the first two numbers among the techniques' fields    x 2^k; between 0 and 1, the odds x 2^k

Fused AdamW is Trainer's default, so every arm has it.  A search starts at the arm as given and walks along one option
at a time.  It tries both neighbors of the best trial, and continues until the next step is no better.  Then it walks
along the next option, until no trials or no steps are left.

A trial trains for its arm's horizon, with a seed that no reported run has.  Some options change what a run costs, not
its loss.  So trials compare by their loss at equal cost,

    score = loss + slope log(cost),    slope = (loss at half the horizon - loss) / log(cost / cost of half the horizon)

with the slope of the baseline as given.

Reference: Dahl et al. (2023), Benchmarking neural network training algorithms, https://arxiv.org/abs/2306.07179: equal
numbers of trials from a published space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_accel.bounds import broken_rule, field_hints
from hf_accel.compare.arms import Arm

SEED = 1001
"""Seed of all trials; reported runs have small seeds."""

TRIALS = 10
"""The fewest trials that count as tuning: the arm as given, and the neighbors in each option that all arms share."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "train_sampling_strategy": ("random", "group_by_length"),
    "weight_decay": (0.0, 0.01, 0.1),
    "adam_beta2": (0.95, 0.98, 0.999),
}
SPACE = (
    "peak learning rate, batch size, grouping by length, weight decay, beta2, and two fields of the arm's techniques, "
    "around the arm as given"
)

Point = tuple[int, ...]
"""Steps from the start in each option."""
Outcome = tuple[float, float]
"""Loss and cost of a run; the loss is infinite if it failed."""


@dataclass(frozen=True)
class Option:
    """One option of a search.

    Args:
        name: An argument, or ``Technique.field``.
        value: Return the value some steps from the start; None: there is none.
    """

    name: str
    value: Callable[[int], Any]


def options(arm: Arm) -> list[Option]:
    """Return the options of an arm's search, without the arguments that its techniques replace."""
    args = arm.recipe.training_arguments()
    found = [
        Option("learning_rate", lambda i: _rounded(args.learning_rate * math.sqrt(2) ** i)),
        Option("per_device_train_batch_size", lambda i: _scaled(args.per_device_train_batch_size, i)),
    ]
    for name, values in CHOICES.items():
        if name not in arm.replaced():
            found.append(_choice(name, getattr(args, name), values))
    return found + [_number(*number) for number in numbers(arm)[:2]]


def numbers(arm: Arm) -> list[tuple[str, float, Any]]:
    """Return the techniques' fields that are numbers other than 0, in order: name, value and annotation."""
    return [
        (f"{name}.{hyperparameter.name}", value, field_hints(type(technique))[hyperparameter.name])
        for entry, technique in zip(arm.recipe.techniques, arm.recipe.build_techniques(), strict=True)
        for name in entry
        for hyperparameter in dataclasses.fields(technique)
        if type(value := getattr(technique, hyperparameter.name)) in (int, float) and value
    ]


def _choice(name: str, start: Any, values: Sequence[Any]) -> Option:
    ordered = list(values) if start in values else sorted([*values, start])
    begin = ordered.index(start)
    return Option(name, lambda i: ordered[begin + i] if 0 <= begin + i < len(ordered) else None)


def _number(name: str, start: float, hint: Any) -> Option:
    def value(steps: int) -> float | None:
        found = _scaled(start, steps)
        return None if found is None or broken_rule(found, hint) is not None else found

    return Option(name, value)


def _scaled(start: float, steps: int) -> float | None:
    """Scale a number by 2^steps; a whole one stays whole and positive, one between 0 and 1 stays there."""
    if isinstance(start, int):
        size = start * 2.0**steps
        return int(size) if size >= 1 and size == int(size) else None
    odds = start / (1 - start) * 2.0**steps if 0 < start < 1 else 0.0
    return start if steps == 0 else _rounded(odds / (1 + odds) if odds else start * 2.0**steps)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass
class Search:
    """The search of one arm.

    Args:
        options: Options that it varies; the first is the learning rate.
        trials: Largest number of trials.
        slope: Change of the loss with log cost.
    """

    options: Sequence[Option]
    trials: int
    slope: float = 0.0
    outcomes: dict[Point, Outcome] = field(default_factory=dict)
    turn: int = 0
    """Index of the present move."""

    def proposals(self) -> list[Point]:
        """Return the points to try next; none when the search is over."""
        left = self.trials - len(self.outcomes)
        if not self.outcomes:
            return [(0,) * len(self.options)][:left]
        moves = [(0, 2), *((index, 1) for index in range(1, len(self.options))), (0, 1)]
        for turn in range(self.turn, self.turn + len(moves)):
            index, step = moves[turn % len(moves)]
            neighbors = [self._shifted(index, step), self._shifted(index, -step)]
            if untried := [point for point in neighbors if point is not None and point not in self.outcomes]:
                self.turn = turn % len(moves)
                return untried[:left]
        return []

    def _shifted(self, index: int, steps: int) -> Point | None:
        moved = self.best[index] + steps
        if self.options[index].value(moved) is None:
            return None
        return (*self.best[:index], moved, *self.best[index + 1 :])

    def score(self, point: Point) -> float:
        """Return the loss of a trial at equal cost; lower is better."""
        loss, cost = self.outcomes[point]
        return loss + (self.slope * math.log(cost) if math.isfinite(cost) and cost > 0 else 0.0)

    @property
    def best(self) -> Point:
        """The point with the lowest score; among equals, the first that was tried."""
        return min(self.outcomes, key=self.score)

    def values(self, point: Point) -> dict[str, Any]:
        """Return the value of each option at a point."""
        return {option.name: option.value(steps) for option, steps in zip(self.options, point, strict=True)}

    def record(self) -> list[dict[str, Any]]:
        """Return the trials in order, each with its options, loss and cost."""
        return [self.values(point) | {"loss": loss, "cost": cost} for point, (loss, cost) in self.outcomes.items()]


def tune(arms: Sequence[Arm], trials: int, train: Callable[[list[Arm]], list[Outcome]]) -> dict[str, Search]:
    """Search for every arm at once, the baseline first; ``train`` trains some arms and returns their outcomes."""
    searches = {arm.name: Search(options(arm), trials) for arm in arms}
    start = _trial(arms[0], searches[arms[0].name], searches[arms[0].name].proposals()[0])
    slope = _slope(*train([start, dataclasses.replace(start, horizon=start.horizon / 2)]))
    for search in searches.values():
        search.slope = slope
    while proposals := [(arm, point) for arm in arms for point in searches[arm.name].proposals()]:
        outcomes = train([_trial(arm, searches[arm.name], point) for arm, point in proposals])
        for (arm, point), outcome in zip(proposals, outcomes, strict=True):
            searches[arm.name].outcomes[point] = outcome
    return searches


def _slope(whole: Outcome, half: Outcome) -> float:
    """Return the fall of the loss per unit of log cost; 0 where it cannot be measured."""
    if not all(map(math.isfinite, (*whole, *half))) or not 0 < half[1] < whole[1]:
        return 0.0
    return max((half[0] - whole[0]) / math.log(whole[1] / half[1]), 0.0)


def _trial(arm: Arm, search: Search, point: Point) -> Arm:
    moved = [f"{o.name} {o.value(steps)}" for o, steps in zip(search.options, point, strict=True) if steps]
    name = f"{arm.name}, {', '.join(moved) or 'as given'}"
    return dataclasses.replace(arm.changed(search.values(point)), name=name, role="candidate")
