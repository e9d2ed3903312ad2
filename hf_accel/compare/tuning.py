"""Equal tuning for every arm: the same number of trials, in the same space, by the same rule.

The space is the peak learning rate times 2^(i/2) and the batch size times 2^j, for integers i and j; (0, 0) is the arm
as given.  A pattern search starts there.  It tries both neighbors of the best trial so far in the first of these moves
that has untried neighbors,

    the learning rate by a factor of 2;  the batch size by a factor of 2;  the learning rate by a factor of sqrt(2)

until no trials or no moves are left.  A trial trains for its arm's horizon, with a seed that no reported run has.

Reference: Dahl et al. (2023), Benchmarking neural network training algorithms, https://arxiv.org/abs/2306.07179: equal
numbers of trials from a published space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_accel.compare.arms import Arm

SEED = 1001
"""Seed of all trials; reported runs have small seeds."""

TRIALS = 4
"""The fewest trials that count as tuning: the arm as given, two other learning rates, another batch size."""

Point = tuple[int, int]
"""Powers of sqrt(2) in the learning rate and of 2 in the batch size."""

MOVES: tuple[tuple[Point, Point], ...] = (((2, 0), (-2, 0)), ((0, 1), (0, -1)), ((1, 0), (-1, 0)))

SPACE = "peak learning rate x 2^(i/2), batch size x 2^j, around the arm as given"


@dataclass
class Search:
    """The search of one arm.

    Args:
        learning_rate: Peak learning rate at the point (0, 0).
        batch_size: Examples per step on one device at the point (0, 0).
        trials: Largest number of trials.
    """

    learning_rate: float
    batch_size: int
    trials: int
    losses: dict[Point, float] = field(default_factory=dict)
    """Loss of each trial; infinite where its run failed."""

    def proposals(self) -> list[Point]:
        """Return the points to try next; none when the search is over."""
        left = self.trials - len(self.losses)
        if not self.losses:
            return [(0, 0)][:left]
        rate, batch = self.best
        for move in MOVES:
            neighbors = [(rate + i, batch + j) for i, j in move]
            untried = [point for point in neighbors if point not in self.losses and self._is_whole(point)]
            if untried:
                return untried[:left]
        return []

    def _is_whole(self, point: Point) -> bool:
        size = self.batch_size * 2.0 ** point[1]
        return size >= 1 and size == int(size)

    @property
    def best(self) -> Point:
        """The point with the lowest loss; among equals, the first that was tried."""
        return min(self.losses, key=lambda point: self.losses[point])

    def args(self, point: Point) -> dict[str, Any]:
        """Return the arguments at a point; the learning rate has three digits."""
        rate = float(f"{self.learning_rate * math.sqrt(2) ** point[0]:.3g}")
        return {"learning_rate": rate, "per_device_train_batch_size": int(self.batch_size * 2.0 ** point[1])}

    def record(self) -> list[dict[str, Any]]:
        """Return the trials in order, each with its arguments and its loss."""
        return [self.args(point) | {"loss": loss} for point, loss in self.losses.items()]


def tune(arms: Sequence[Arm], trials: int, train: Callable[[list[Arm]], list[float]]) -> dict[str, Search]:
    """Search for every arm at once; ``train`` trains some arms and returns the loss of each."""
    searches = {}
    for arm in arms:
        args = arm.recipe.training_arguments()
        searches[arm.name] = Search(args.learning_rate, args.per_device_train_batch_size, trials)
    while proposals := [(arm, point) for arm in arms for point in searches[arm.name].proposals()]:
        losses = train([_trial(arm, searches[arm.name].args(point)) for arm, point in proposals])
        for (arm, point), loss in zip(proposals, losses, strict=True):
            searches[arm.name].losses[point] = loss
    return searches


def _trial(arm: Arm, args: dict[str, Any]) -> Arm:
    name = "{}, learning rate {learning_rate:g}, batch {per_device_train_batch_size}".format(arm.name, **args)
    return dataclasses.replace(arm.changed(args), name=name, role="candidate")
