"""How many times faster, and how sure that is: a candidate against the curve of a baseline.

The baseline is trained at several horizons, each with its learning rate decayed to zero inside it.  That gives, for
each seed, a curve of loss against log cost.  What counts for a candidate that reached loss q at cost t is

    speed-up_seed = T_seed(q) / t,      T_seed(q) = cost at which the baseline of the same seed reaches q

and the mean of the logarithms over seeds, with Student's interval.  Because each seed has a curve of its own, the noise
of the curve is a part of what varies between seeds, and of the interval.  What does not vary is where a curve runs
between its knots; the interval is widened by that doubt (`Curve.log_cost`).  Without it, 95 % intervals covered the
truth in as few as 15 % of simulated comparisons on steep curves; with it, in 94 % and more.

Reference: Kaddour et al. (2023), No train no gain, https://arxiv.org/abs/2307.06440: against a baseline that may choose
its horizon, most published speed-ups vanish.

A *loss* here is any quality, turned so that lower is better.  Shape suffixes: ``S`` seeds, ``H`` horizons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

try:
    from scipy.interpolate import PchipInterpolator
    from scipy.stats import t as student
except ImportError as error:
    raise ImportError("hf_accel.compare: needs scipy. Install it with: pip install 'hf-accel[compare]'.") from error

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """Loss against log cost of one seed's baseline: knots of ascending cost and strictly descending loss."""

    log_costs: np.ndarray
    losses: np.ndarray

    def log_cost(self, loss: float) -> tuple[float, float]:
        """Logarithm of the cost at which the loss is reached, inside the range of the knots, and its uncertainty.

        Two monotone cubics (PCHIP) go through the knots, one of loss against log cost and one of log cost against loss;
        on curves that flatten out they err to opposite sides.  The value is their mean, the uncertainty half of their
        distance.  (Straight lines would lie above a loss curve, which is convex, and credit every candidate with one
        to five percent that it does not have.)
        """
        assert self.losses[-1] <= loss <= self.losses[0], "losses outside of the curve are bounds or misses"
        if loss in self.losses:
            return float(self.log_costs[self.losses == loss][0]), 0.0
        across = float(PchipInterpolator(self.losses[::-1], self.log_costs[::-1])(loss))
        along = PchipInterpolator(self.log_costs, self.losses)
        down = float(along.solve(loss, extrapolate=False)[0])
        return (across + down) / 2, abs(across - down) / 2


def fit_curve(costs_H: ArrayLike, losses_H: ArrayLike) -> Curve:
    """The curve of one seed, made monotone.

    Where noise lets a costlier run end worse, neighbors are averaged, in loss and in log cost, until the loss falls
    from knot to knot (isotonic regression by pooling of adjacent violators; a pooled knot stays one point, so that the
    inverse is continuous).  Runs without a finite loss are left out.
    """
    costs, losses = np.asarray(costs_H, float), np.asarray(losses_H, float)
    finite = np.isfinite(losses) & np.isfinite(costs)
    if not finite.any():
        raise ValueError("baseline: no run of a seed ended with a finite loss. Lower its learning rate.")
    knots: list[tuple[float, float, int]] = []
    for cost, loss in sorted(zip(costs[finite], losses[finite], strict=True)):
        knot = (math.log(cost), float(loss), 1)
        while knots and knots[-1][1] <= knot[1]:
            (x, y, n), (x2, y2, n2) = knots.pop(), knot
            knot = ((x * n + x2 * n2) / (n + n2), (y * n + y2 * n2) / (n + n2), n + n2)
        knots.append(knot)
    log_costs, values, _ = (np.array(column) for column in zip(*knots, strict=True))
    return Curve(log_costs, values)


def useful_horizons(losses_SH: ArrayLike) -> np.ndarray:
    """Which horizons improve, in the mean over seeds, on all shorter ones; a mask (H,).

    Who overfits at the longest horizon would train less, and so does the baseline.
    """
    losses = np.ma.masked_invalid(np.asarray(losses_SH, float)).mean(axis=0).filled(math.inf)
    best = np.concatenate([[math.inf], np.minimum.accumulate(losses)[:-1]])
    return losses < best


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up at equal quality.

    Args:
        kind: ``measured``; ``bound``: for some seeds the candidate was better than the longest baseline, and the truth
            is at least ``value``; ``miss``: for some it was worse than the shortest, or failed, which counts as
            infinite time, and the truth is below ``high``.
        value: Geometric mean over seeds; 0 for a miss.
        low: Lower end of the 95 % interval.
        high: Upper end; infinite where it is not known.
        per_seed: The speed-up of each seed, or its bound; 0 where it failed.
        bounds: Seeds that were better than the longest baseline.
        misses: Seeds that were worse than the shortest baseline, or failed.
    """

    kind: Literal["measured", "bound", "miss"]
    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    bounds: int = 0
    misses: int = 0

    def __str__(self) -> str:
        if self.kind == "miss":
            below = f", < {self.high:.2f}x" if math.isfinite(self.high) else ""
            return f"miss ({self.misses} of {len(self.per_seed)}{below})"
        if self.kind == "bound":
            return f">= {self.value:.2f}x [{self.low:.2f}, -]"
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def speed_up(
    baseline_costs_SH: ArrayLike,
    baseline_losses_SH: ArrayLike,
    candidate_costs_S: ArrayLike,
    candidate_losses_S: ArrayLike,
    confidence: float = CONFIDENCE,
) -> SpeedUp:
    """The speed-up of a candidate whose seeds are those of the baseline, in the same order.

    Nothing is extrapolated: outside of the baseline's range of losses a seed gives a bound or a miss, never a number.
    """
    costs_SH, losses_SH = np.asarray(baseline_costs_SH, float), np.asarray(baseline_losses_SH, float)
    useful = useful_horizons(losses_SH)
    logs, kinds, doubts = [], [], [0.0]
    for costs_H, losses_H, cost, loss in zip(
        costs_SH, losses_SH, np.asarray(candidate_costs_S, float), np.asarray(candidate_losses_S, float), strict=True
    ):
        curve = fit_curve(costs_H[useful], losses_H[useful])
        if not (math.isfinite(loss) and math.isfinite(cost)):
            reached, kind = -math.inf, "miss"
        elif loss > curve.losses[0]:
            reached, kind = float(curve.log_costs[0]) - math.log(cost), "miss"
        elif loss < curve.losses[-1]:
            reached, kind = float(curve.log_costs[-1]) - math.log(cost), "bound"
        else:
            (log_cost, doubt), kind = curve.log_cost(loss), "measured"
            reached = log_cost - math.log(cost)
            doubts.append(doubt)
        logs.append(reached)
        kinds.append(kind)
    bounds, misses = kinds.count("bound"), kinds.count("miss")
    per_seed = tuple(math.exp(value) for value in logs)
    doubt = sum(doubts) / len(logs)  # of interpolation: alike for all seeds, so no mean over seeds removes it
    if misses:
        known = bounds == 0 and all(map(math.isfinite, logs))
        high = math.exp(mean_interval(logs, confidence)[2] + doubt) if known else math.inf
        return SpeedUp("miss", 0.0, 0.0, high, per_seed, bounds, misses)
    mean, low, high = mean_interval(logs, confidence)
    mean, low, high = math.exp(mean), math.exp(low - doubt), math.exp(high + doubt)
    if bounds:
        # Each value is at most the truth, so the lower end holds for the truth, too.
        return SpeedUp("bound", mean, low, math.inf, per_seed, bounds, misses)
    return SpeedUp("measured", mean, low, high, per_seed, bounds, misses)


def p_value(found: SpeedUp, confidence: float = CONFIDENCE) -> float:
    """One-sided p of "not faster than the baseline"; 2.5 % where the interval begins at 1."""
    seeds = len(found.per_seed)
    if found.kind == "miss" or seeds < 2:
        return 1.0
    half = math.log(found.value) - math.log(found.low)
    quantile = float(student.ppf(0.5 + confidence / 2, seeds - 1))
    return float(student.sf(math.log(found.value) * quantile / max(half, 1e-12), seeds - 1))


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and the ends of Student's interval; a single value has an infinite one."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(student.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def non_inferiority_margin(seed_sigma: float, floor: float) -> float:
    """The loss that does not matter: half the standard deviation between seeds, at least the floor.

    Fixed before a comparison, from seeds that it does not use.
    """
    return max(0.5 * seed_sigma, floor)


@dataclass(frozen=True)
class NonInferiority:
    """Whether a candidate's loss is at most a margin above the baseline's, over paired seeds, one-sided at 5 %.

    Args:
        verdict: ``non-inferior``: the upper bound is below the margin; ``inferior``: the lower bound is above it;
            ``undecided``: neither, more seeds are needed.
        difference: Mean of candidate minus baseline; negative is better.
        low: Lower one-sided bound.
        high: Upper one-sided bound.
        margin: The margin.
    """

    verdict: Literal["non-inferior", "inferior", "undecided"]
    difference: float
    low: float
    high: float
    margin: float

    def __str__(self) -> str:
        return self.verdict


def non_inferiority(candidate_losses_S: ArrayLike, baseline_losses_S: ArrayLike, margin: float) -> NonInferiority:
    """Compare final losses of the same seeds.

    A candidate's run that failed makes it inferior; against a baseline without a finite loss nothing is decided.
    """
    if not np.isfinite(np.asarray(baseline_losses_S, float)).all():
        return NonInferiority("undecided", math.nan, -math.inf, math.inf, margin)
    differences = np.asarray(candidate_losses_S, float) - np.asarray(baseline_losses_S, float)
    if not np.isfinite(differences).all():
        return NonInferiority("inferior", math.inf, math.inf, math.inf, margin)
    mean, low, high = mean_interval(differences, 2 * CONFIDENCE - 1)
    verdict = "non-inferior" if high < margin else "inferior" if low > margin else "undecided"
    return NonInferiority(verdict, mean, low, high, margin)
