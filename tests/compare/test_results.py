"""Rows from records that are written by hand."""

import pytest

from hf_accel.compare.arms import Arm
from hf_accel.compare.collect import Design, collect
from hf_accel.compare.workloads import build_workload
from hf_accel.recipe import Recipe


def made(accuracy, cost):
    costs = {"cpu_seconds": cost, "wall_seconds": cost, "flops": 1e9, "tokens": 8.0, "samples": 64.0, "steps": 8.0}
    return {
        "status": "finished",
        "metrics": {"eval_accuracy": accuracy},
        "costs": costs,
        "set_up": {"cpu_seconds": 0.1},
        "peak_memory_bytes": 2**28,
    }


def test_of_accuracies_the_higher_is_better():
    horizons, seeds = [0.25, 0.5, 1.0, 1.5], [1, 2, 3]
    arms = [
        Arm("baseline", Recipe(), "baseline"),
        Arm("half", Recipe(techniques=["GradientSpikeGuard"])),
        Arm("worse", Recipe(techniques=["Muon"])),
    ]
    design = Design(
        workload=build_workload("synthetic"),
        metric="eval_accuracy",
        lower_is_better=False,
        seeds=seeds,
        horizons=horizons,
        budget=None,
        cost="cpu_seconds",
        tuned="",
        trials={},
        baseline_args={},
    )
    records = {}
    for seed in seeds:
        shift = 0.001 * seed  # of all arms of a seed
        for horizon in horizons:
            records["baseline", horizon, seed] = made(0.9 - 0.1 / horizon + shift, 10 * horizon)
        records["half", 1.0, seed] = made(0.8 + shift, 5.0)
        records["worse", 1.0, seed] = made(0.3 + shift, 5.0)
    results = collect(design, arms, records)
    assert not results.lower_is_better
    half, worse = results.row("half"), results.row("worse")
    assert half.quality == pytest.approx(0.802) and half.speed_ups["cpu_seconds"].kind == "measured"
    assert half.speed_ups["cpu_seconds"].value == pytest.approx(2.0)
    assert half.non_inferiority.verdict == "non-inferior" and half.non_inferiority.difference == pytest.approx(0)
    assert worse.speed_ups["cpu_seconds"].kind == "miss"
    assert worse.non_inferiority.verdict == "inferior" and worse.non_inferiority.difference == pytest.approx(0.5)
