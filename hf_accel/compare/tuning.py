"""Equal tuning for every arm: the same number of trials, in the same space, by the same rule.

The space is the peak learning rate times 2^(i/2) and the batch size times 2^j, with whole i and j; (0, 0) is the arm as
it was given.  A pattern search goes through it: of the best trial so far, both neighbors in the first of these moves
that has untried ones,

    the learning rate by a factor of 2;  the batch size by a factor of 2;  the learning rate by a factor of sqrt(2)

until the trials are spent or no move is left.  A trial trains for the horizon of its arm, with a seed that no reported
run has.

Reference: Dahl et al. (2023), Benchmarking neural network training algorithms, https://arxiv.org/abs/2306.07179: equal
numbers of trials from a published space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SEED = 1001
"""The seed of trials; reported runs have small numbers."""

Point = tuple[int, int]
"""Steps of sqrt(2) in the learning rate, of 2 in the batch size."""

MOVES: tuple[tuple[Point, Point], ...] = (((2, 0), (-2, 0)), ((0, 1), (0, -1)), ((1, 0), (-1, 0)))

SPACE = "peak learning rate x 2^(i/2), batch size x 2^j, around the arm as given"


@dataclass
class Search:
    """The search of one arm.

    Args:
        learning_rate: Peak, at the point (0, 0).
        batch_size: Examples of a step on one device, at the point (0, 0).
        trials: How many may be made.
    """

    learning_rate: float
    batch_size: int
    trials: int
    losses: dict[Point, float] = field(default_factory=dict)
    """What was tried, and how it ended; infinite where a run failed."""

    def proposals(self) -> list[Point]:
        """What to try next, all at once; empty when the search is over."""
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
        """The point of the lowest loss; of equal ones, the first that was tried."""
        return min(self.losses, key=lambda point: self.losses[point])

    def args(self, point: Point) -> dict[str, Any]:
        """The arguments of a point; the learning rate to three digits."""
        rate = float(f"{self.learning_rate * math.sqrt(2) ** point[0]:.3g}")
        return {"learning_rate": rate, "per_device_train_batch_size": int(self.batch_size * 2.0 ** point[1])}

    def record(self) -> list[dict[str, Any]]:
        """The trials in order, each with its arguments and its loss."""
        return [self.args(point) | {"loss": loss} for point, loss in self.losses.items()]
