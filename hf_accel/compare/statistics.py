"""Speed-ups with intervals: a candidate against the curve of a baseline.

The baseline is trained at several horizons, and its learning rate decays to zero within each.  Each seed then has a
curve of loss against log cost.  For a candidate that reached loss q at cost t,

    speed-up_seed = T_seed(q) / t,      T_seed(q) = cost at which the baseline of the same seed reaches q

The result is the mean of the logarithms over seeds, with Student's interval.  Because each seed has its own curve, the
interval includes the noise of the curve.  It is widened by the uncertainty of a curve between its knots, which all
seeds share (`Curve.log_cost`).  Without that, 95 % intervals covered the truth in as few as 15 % of simulated
comparisons on steep curves; with it, in 94 % and more.

Reference: Kaddour et al. (2023), No train no gain, https://arxiv.org/abs/2307.06440: against a baseline that may choose
its horizon, most published speed-ups vanish.

A *loss* here is any quality with its sign chosen so that lower is better.  Shape suffixes: ``S`` seeds, ``H`` horizons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """One seed's baseline, loss against log cost: costs ascend from knot to knot, and losses descend strictly."""

    log_costs: np.ndarray
    losses: np.ndarray

    def log_cost(self, loss: float) -> tuple[float, float]:
        """Return the logarithm of the cost that reaches a loss within the knots' range, and its uncertainty.

        Two monotone cubics (PCHIP) go through the knots: loss against log cost, and log cost against loss.  On curves
        that flatten out they err to opposite sides.  The value is their mean, the uncertainty half their distance.
        Straight lines would lie above a convex loss curve and credit every candidate with a spurious 1 to 5 %.
        """
        assert self.losses[-1] <= loss <= self.losses[0], "losses outside of the curve are bounds or misses"
        if loss in self.losses:
            return float(self.log_costs[self.losses == loss][0]), 0.0
        across = float(PchipInterpolator(self.losses[::-1], self.log_costs[::-1])(loss))
        along = PchipInterpolator(self.log_costs, self.losses)
        down = float(along.solve(loss, extrapolate=False)[0])
        return (across + down) / 2, abs(across - down) / 2


def fit_curve(costs_H: ArrayLike, losses_H: ArrayLike) -> Curve:
    """Fit a monotone curve to one seed's runs, without those that have no finite loss.

    Noise can make a costlier run end worse.  Neighbors are then averaged in loss and in log cost, until the loss falls
    from knot to knot (isotonic regression by pooling adjacent violators).  A pooled knot stays one point, so that the
    inverse is continuous.
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
    """Return a mask (H,) of the horizons that improve, in the mean over seeds, on all shorter ones.

    Horizons at which the baseline overfits are ignored.
    """
    losses = np.ma.masked_invalid(np.asarray(losses_SH, float)).mean(axis=0).filled(math.inf)
    best = np.concatenate([[math.inf], np.minimum.accumulate(losses)[:-1]])
    return losses < best


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up at equal quality.

    Args:
        kind: ``measured``; ``bound``: some seeds were better than the longest baseline, so the truth is at least
            ``value``; ``miss``: some were worse than the shortest baseline or failed, so the truth is below ``high``.
        value: Geometric mean over seeds; 0 for a miss.
        low: Lower end of the 95 % interval.
        high: Upper end; infinite if unknown.
        per_seed: Speed-up of each seed, or its bound; 0 if it failed.
        bounds: Number of seeds that were better than the longest baseline.
        misses: Number of seeds that were worse than the shortest baseline or failed.
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
) -> SpeedUp:
    """Compare a candidate with a baseline of the same seeds, in the same order.

    Nothing is extrapolated: outside the baseline's range of losses a seed gives a bound or a miss, never a number.
    """
    costs_SH, losses_SH = np.asarray(baseline_costs_SH, float), np.asarray(baseline_losses_SH, float)
    useful = useful_horizons(losses_SH)
    logs, kinds, doubt = [], [], 0.0
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
            (log_cost, uncertainty), kind = curve.log_cost(loss), "measured"
            reached = log_cost - math.log(cost)
            doubt += uncertainty
        logs.append(reached)
        kinds.append(kind)
    bounds, misses = kinds.count("bound"), kinds.count("miss")
    per_seed = tuple(math.exp(value) for value in logs)
    doubt /= len(logs)  # all seeds err alike, so the mean over seeds does not reduce it
    if misses:
        known = bounds == 0 and all(map(math.isfinite, logs))
        high = math.exp(mean_interval(logs)[2] + doubt) if known else math.inf
        return SpeedUp("miss", 0.0, 0.0, high, per_seed, bounds, misses)
    mean, low, high = mean_interval(logs)
    mean, low, high = math.exp(mean), math.exp(low - doubt), math.exp(high + doubt)
    if bounds:
        # Each value is at most the truth, so the lower end holds for the truth, too.
        return SpeedUp("bound", mean, low, math.inf, per_seed, bounds, misses)
    return SpeedUp("measured", mean, low, high, per_seed, bounds, misses)


def p_value(found: SpeedUp) -> float:
    """Return the one-sided p of "not faster than the baseline"; 2.5 % if the 95 % interval begins at 1."""
    seeds = len(found.per_seed)
    if found.kind == "miss" or seeds < 2:
        return 1.0
    half = math.log(found.value) - math.log(found.low)
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, seeds - 1))
    return float(student.sf(math.log(found.value) * quantile / max(half, 1e-12), seeds - 1))


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the mean and the ends of Student's interval, which is infinite for a single value."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(student.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class NonInferiority:
    """A test of whether a candidate's loss is at most a margin above the baseline's: paired, one-sided at 5 %.

    Args:
        verdict: ``non-inferior``: the upper bound is below the margin; ``inferior``: the lower bound is above it;
            ``undecided``: neither; more seeds are needed.
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

    A failed run makes a candidate inferior; against a baseline without a finite loss, the verdict is undecided.
    """
    if not np.isfinite(np.asarray(baseline_losses_S, float)).all():
        return NonInferiority("undecided", math.nan, -math.inf, math.inf, margin)
    differences = np.asarray(candidate_losses_S, float) - np.asarray(baseline_losses_S, float)
    if not np.isfinite(differences).all():
        return NonInferiority("inferior", math.inf, math.inf, math.inf, margin)
    mean, low, high = mean_interval(differences, 2 * CONFIDENCE - 1)
    verdict = "non-inferior" if high < margin else "inferior" if low > margin else "undecided"
    return NonInferiority(verdict, mean, low, high, margin)
