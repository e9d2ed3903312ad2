from __future__ import annotations

import math

import numpy as np
import pytest

from hf_accel.compare.statistics import (
    fit_curve,
    mean_interval,
    non_inferiority,
    speed_up,
    useful_horizons,
)
from hf_accel.compare.workloads.synthetic import Synthetic

HORIZONS = np.array([0.25, 0.5, 0.75, 1.0, 1.5])


def logarithmic(costs):
    """A straight line against log cost, which every interpolation reproduces."""
    return 3.0 - 0.5 * np.log(costs)


def baseline(seeds=3):
    return np.tile(HORIZONS, (seeds, 1)), np.tile(logarithmic(HORIZONS), (seeds, 1))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("reached", [0.25, 0.3, 1.0, 1.2, 1.5])
def test_the_speed_up_is_the_ratio_of_costs_at_equal_loss(factor, reached):
    result = speed_up(*baseline(), [reached / factor] * 3, [logarithmic(reached)] * 3)
    assert result.kind == "measured"
    assert [result.low, result.value, result.high] == pytest.approx([factor] * 3, rel=1e-6)
    assert result.per_seed == pytest.approx([factor] * 3, rel=1e-6)


def test_the_interval_is_students_on_logarithms():
    costs = np.array([0.5, 0.4, 0.45])
    result = speed_up(*baseline(), costs, [logarithmic(1.0)] * 3)
    logs = -np.log(costs)
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # t(0.975, 2), from a table
    assert math.log(result.value) == pytest.approx(logs.mean())
    assert math.log(result.low) == pytest.approx(logs.mean() - half, rel=1e-5)
    assert math.log(result.high) == pytest.approx(logs.mean() + half, rel=1e-5)


def test_seeds_are_paired():
    """What moves a seed's curve and its candidate alike leaves no trace in the interval."""
    costs, losses = baseline()
    shift = np.array([[0.3], [-0.2], [0.0]])
    result = speed_up(costs, losses + shift, [0.5] * 3, logarithmic(1.0) + shift[:, 0])
    assert [result.low, result.high] == pytest.approx([2.0, 2.0])


def test_outside_of_the_baseline_there_are_no_numbers():
    better, worse, same = logarithmic(1.6), logarithmic(0.2), logarithmic(1.0)
    bound = speed_up(*baseline(), [0.5] * 3, [better, same, same])
    assert bound.kind == "bound" and bound.bounds == 1 and bound.high == math.inf
    assert bound.per_seed == pytest.approx((3.0, 2.0, 2.0)), "the longest baseline, not what lies beyond"
    assert str(bound).startswith(">= 2.29x")
    miss = speed_up(*baseline(), [0.5] * 3, [worse, worse, worse])
    assert miss.kind == "miss" and miss.value == miss.low == 0 and miss.high == pytest.approx(0.5)
    assert str(miss) == "miss (3 of 3, < 0.50x)"
    both = speed_up(*baseline(), [0.5] * 3, [better, worse, same])
    assert (both.kind, both.bounds, both.misses, both.high) == ("miss", 1, 1, math.inf)


def test_the_bound_of_a_miss_has_the_doubt_of_interpolation():
    costs, losses = np.tile(HORIZONS, (3, 1)), np.tile(1 + 0.3 / HORIZONS, (3, 1))
    between, worse = 1 + 0.3 / 0.35, 1 + 0.3 / 0.2
    doubt = fit_curve(HORIZONS, losses[0]).log_cost(between)[1]
    assert doubt > 0.001
    result = speed_up(costs, losses, [0.25] * 3, [between, between, worse])
    logs = np.log(result.per_seed)
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # t(0.975, 2), from a table
    assert math.log(result.high) == pytest.approx(logs.mean() + half + 2 / 3 * doubt, rel=1e-5)


def test_the_doubt_of_interpolation_widens_the_interval():
    costs, losses = np.tile(HORIZONS, (3, 1)), np.tile(1 + 0.3 / HORIZONS, (3, 1))
    between = 1 + 0.3 / 0.35
    doubt = fit_curve(HORIZONS, losses[0]).log_cost(between)[1]
    result = speed_up(costs, losses, [0.25, 0.2, 0.22], [between] * 3)
    logs = np.log(result.per_seed)
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # t(0.975, 2), from a table
    assert result.kind == "measured" and doubt > 0.001
    assert math.log(result.low) == pytest.approx(logs.mean() - half - doubt, abs=1e-6)
    assert math.log(result.high) == pytest.approx(logs.mean() + half + doubt, abs=1e-6)


@pytest.mark.parametrize("cost, loss", [(math.inf, 2.0), (0.5, math.nan), (0.5, math.inf), (math.nan, math.nan)])
def test_a_failed_run_is_a_miss(cost, loss):
    result = speed_up(*baseline(), [0.5, 0.5, cost], [logarithmic(1.0)] * 2 + [loss])
    assert result.kind == "miss" and result.value == 0 and result.per_seed[2] == 0


def test_one_seed_has_no_interval():
    result = speed_up(*baseline(1), [0.5], [logarithmic(1.0)])
    assert result.value == pytest.approx(2.0) and (result.low, result.high) == (0.0, math.inf)


def test_noise_is_pooled_to_a_falling_curve():
    curve = fit_curve([1, 2, 4, 8], [3.0, 2.0, 2.2, 1.0])
    assert curve.losses == pytest.approx([3.0, 2.1, 1.0])
    assert np.exp(curve.log_costs) == pytest.approx([1, math.sqrt(8), 8])
    assert fit_curve([4, 1, 2], [1.0, 3.0, math.nan]).losses == pytest.approx([3.0, 1.0]), (
        "in any order, failed ones out"
    )
    flat = fit_curve([1, 4], [2.0, 2.0])
    assert flat.losses == pytest.approx([2.0]) and flat.log_cost(2.0) == pytest.approx((math.log(2), 0.0))
    with pytest.raises(ValueError, match="no run of a seed ended with a finite loss"):
        fit_curve([1, 2], [math.nan, math.inf])


def test_curves_are_inverse_and_monotone():
    generator = np.random.default_rng(0)
    for _ in range(20):
        curve = fit_curve(np.cumsum(generator.exponential(size=6)), generator.normal(size=6))
        grid = np.linspace(curve.losses[-1], curve.losses[0], 50)
        log_costs = [curve.log_cost(loss)[0] for loss in grid]
        assert (np.diff(log_costs) <= 1e-9).all()
        for log_cost, loss in zip(curve.log_costs, curve.losses, strict=True):
            assert curve.log_cost(loss) == (log_cost, 0.0)


@pytest.mark.parametrize("asymptote, amplitude, exponent", [(1.0, 0.6, 0.5), (0.0, 1.6, 0.2), (1.4, 0.3, 0.8)])
def test_between_knots_at_most_half_a_percent_is_beyond_the_doubt(asymptote, amplitude, exponent):
    curve = fit_curve(HORIZONS, asymptote + amplitude * HORIZONS**-exponent)
    for cost in np.linspace(0.26, 1.49, 60):
        log_cost, doubt = curve.log_cost(asymptote + amplitude * cost**-exponent)
        assert abs(log_cost - math.log(cost)) < doubt + 0.004


def test_the_baseline_does_not_overfit_on_purpose():
    losses = np.array([[3.0, 2.0, 2.5, math.nan], [3.0, 2.2, 2.1, math.nan]])
    assert useful_horizons(losses).tolist() == [True, True, False, False]
    assert useful_horizons(losses[1:]).tolist() == [True, True, True, False]
    costs = np.tile([1.0, 2.0, 4.0, 8.0], (2, 1))
    result = speed_up(costs, [[3.0, 2.0, 2.5, 2.6]] * 2, [1.0] * 2, [1.9] * 2)
    assert result.kind == "bound" and result.value == pytest.approx(2.0), "not 8, where it was worse"


@pytest.mark.parametrize(
    "differences, verdict",
    [([0.0, 0.001, -0.001], "non-inferior"), ([0.1, 0.11, 0.1], "inferior"), ([0.1, -0.1, 0.0], "undecided")],
)
def test_non_inferiority(differences, verdict):
    result = non_inferiority(2.0 + np.array(differences), [2.0] * 3, margin=0.01)
    assert result.verdict == str(result) == verdict
    assert result.difference == pytest.approx(np.mean(differences))
    half = 2.919986 * np.std(differences, ddof=1) / math.sqrt(3)  # t(0.95, 2), from a table: one-sided
    assert result.high - result.difference == pytest.approx(half, rel=1e-5)


def test_a_failed_run_is_inferior_and_margins_have_a_floor():
    assert non_inferiority([1.0, math.nan], [2.0, 2.0], 0.01).verdict == "inferior"
    assert non_inferiority([1.0, 1.0], [2.0, math.nan], 0.01).verdict == "undecided", "the baseline has no loss"
    assert Synthetic.margin_floor == 0.003
    for sigma, margin in ((0.02, 0.01), (0.001, 0.003)):
        workload = Synthetic()
        workload.seed_sigma = sigma
        assert workload.margin == margin
    assert mean_interval([1.0]) == (1.0, -math.inf, math.inf)


def simulated(generator: np.random.Generator) -> bool:
    """One comparison of a random kind of task; whether its interval holds the truth.

    A power law with a plateau; noise of the seeds, partly shared within a seed; noise of the clock.
    """
    exponent, plateau, seeds = generator.uniform(0.2, 1.5), generator.uniform(0, 1.5), 5
    truth, reached = math.exp(generator.uniform(-0.7, 1.1)), generator.uniform(0.35, 1.35)

    def law(costs):
        return plateau + 0.5 * costs**-exponent

    # Noise as a share of what doubling the cost brings.
    sigma, timing = generator.uniform(0.01, 0.12) * (law(1.0) - law(2.0)), generator.uniform(0.005, 0.05)
    shared = generator.uniform(0, 0.8)
    common = generator.normal(0, sigma * math.sqrt(shared), seeds)
    own = sigma * math.sqrt(1 - shared)
    shape = (seeds, len(HORIZONS))
    costs = HORIZONS * np.exp(generator.normal(0, timing, shape))
    losses = law(HORIZONS) + common[:, None] + generator.normal(0, own, shape)
    candidate_costs = reached / truth * np.exp(generator.normal(0, timing, seeds))
    candidate_losses = law(reached) + common + generator.normal(0, own, seeds)
    result = speed_up(costs, losses, candidate_costs, candidate_losses)
    return result.low <= truth <= result.high


@pytest.mark.ci
def test_intervals_of_95_percent_cover_at_least_93():
    generator = np.random.default_rng(0)
    covered = np.mean([simulated(generator) for _ in range(1000)])
    assert covered >= 0.93, covered
