"""The null experiment, on simulated curves: what the verdict says of the baseline under other names, and of a gain."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_accel import evidence
from hf_accel.compare import Arm, Comparison
from hf_accel.compare.results import record
from hf_accel.recipe import Recipe

NAMES = ("first", "second", "third")
COMPARISONS = 20


def compared(
    generator: np.random.Generator, gain: float = 1.0, placebo_gain: float = 1.0, placebos: bool = True
) -> list[str]:
    """Return the verdicts of one comparison of three candidates; ``gain`` divides the cost of the first.

    The loss is a power of the cost above a plateau.  A seed moves all its runs by a common amount; runs and the clock
    have noise of their own, as shares of what twice the cost brings.
    """
    exponent, plateau, shared = generator.uniform(0.3, 1.2), generator.uniform(0.0, 1.5), generator.uniform(0.0, 0.8)

    def law(cost: float) -> float:
        return plateau + 0.5 * cost**-exponent

    sigma, timing = generator.uniform(0.01, 0.08) * (law(1) - law(2)), generator.uniform(0.005, 0.03)
    comparison = Comparison([Arm(name, Recipe()) for name in NAMES], workload="synthetic", cost="cpu_seconds")
    own = [Arm(f"placebo of {name}", Recipe(), "placebo", name) for name in NAMES if placebos]
    gains = {"first": gain, "placebo of first": placebo_gain}
    arms, records = [comparison.reference, *comparison.arms, *own], {}
    for seed in comparison.seeds:
        common = generator.normal(0, sigma * math.sqrt(shared))
        for arm in arms:
            for horizon in comparison.horizons if arm.role == "baseline" else [1.0]:
                loss = law(horizon) + common + generator.normal(0, sigma * math.sqrt(1 - shared))
                paid = horizon / gains.get(arm.name, 1.0) * math.exp(generator.normal(0, timing))
                records[arm.name, horizon, seed] = run(loss, paid)
    document = record(comparison.collect(arms, records))
    return [evidence.verdict(document, arm) for arm in document["arms"] if arm["role"] == "candidate"]


def run(loss: float, paid: float) -> dict:
    costs = dict.fromkeys(("wall_seconds", "flops", "tokens", "samples", "steps"), 0.0) | {"cpu_seconds": paid}
    record = {"status": "finished", "metrics": {"eval_loss": loss}, "costs": costs, "set_up": {}}
    return record | {"peak_memory_bytes": 1.0, "log": [], "phases": {}}


def test_the_baseline_under_three_names_is_not_faster_but_by_the_nominal_rate():
    generator = np.random.default_rng(0)
    verdicts = [verdict for _ in range(COMPARISONS) for verdict in compared(generator)]
    assert len(verdicts) == 3 * COMPARISONS
    # At 2.5 % a comparison, more than two of twenty have a chance of 1.3 %.
    assert verdicts.count("faster") <= 2
    assert verdicts.count("no gain shown") > 0.8 * len(verdicts), "and it is no miss, nor slower"


def test_a_planted_gain_is_found_and_its_neighbors_are_not():
    generator = np.random.default_rng(1)
    first, *others = zip(*(compared(generator, gain=1.3) for _ in range(COMPARISONS)), strict=True)
    assert first.count("faster") >= 0.8 * COMPARISONS
    assert sum(verdicts.count("faster") for verdicts in others) <= 2


def test_a_gain_that_its_placebo_has_too_is_none():
    generator = np.random.default_rng(2)
    first = [compared(generator, gain=1.3, placebo_gain=1.3)[0] for _ in range(COMPARISONS)]
    assert first.count("faster") == 0 and first.count("no gain over its placebo") >= 0.8 * COMPARISONS


@pytest.mark.ci
def test_without_placebos_the_rate_of_false_gains_is_the_nominal_one_and_with_them_lower():
    generator = np.random.default_rng(3)
    alone = sum("without placebos" in compared(generator, placebos=False) for _ in range(400))
    beside = sum("faster" in compared(generator) for _ in range(400))
    assert beside <= alone <= 0.035 * 400
