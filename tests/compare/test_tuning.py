from __future__ import annotations

import math

import pytest

from hf_accel import Recipe
from hf_accel.compare import Comparison, tuning
from hf_accel.compare.tuning import Search
from hf_accel.compare.workloads.synthetic import Synthetic


def searched(loss, trials: int, learning_rate: float = 1e-3, batch_size: int = 8) -> Search:
    search = Search(learning_rate, batch_size, trials)
    while points := search.proposals():
        for point in points:
            assert point not in search.losses
            args = search.args(point)
            search.losses[point] = loss(args["learning_rate"], args["per_device_train_batch_size"])
    return search


def bowl(rate: float, batch: int) -> float:
    """Lowest at a learning rate of 0.0057 and a batch of 4."""
    return math.log2(rate / 0.0057) ** 2 + 0.5 * math.log2(batch / 4) ** 2


def test_the_search_ends_at_the_lowest_point_of_a_bowl():
    search = searched(bowl, trials=30)
    assert search.args(search.best) == {"learning_rate": 5.66e-3, "per_device_train_batch_size": 4}
    assert len(search.losses) < 30, "it stops where no neighbor is better"


@pytest.mark.parametrize("trials", [1, 2, 3, 8])
def test_every_arm_has_its_number_of_trials(trials):
    search = searched(bowl, trials)
    assert len(search.record()) == trials
    assert search.record()[0] == {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "loss": pytest.approx(bowl(1e-3, 8)),
    }


def test_batches_are_whole_and_failures_are_infinitely_bad():
    search = searched(lambda rate, batch: batch if rate < 3e-3 else math.inf, trials=20, batch_size=3)
    assert {trial["per_device_train_batch_size"] for trial in search.record()} <= {3, 6}
    assert search.args(search.best)["learning_rate"] < 3e-3


@pytest.mark.full  # a minute
def test_arms_are_tuned_alike_and_reported_with_other_seeds(tmp_path):
    comparison = Comparison(
        ["hf_accel.compare.workloads.synthetic:DoesNothing"],
        workload=Synthetic(seconds=0.05),
        horizons=(0.5, 1.0),
        seeds=2,
        tune=4,
        placebos=False,
        out=tmp_path,
    )
    results = comparison.run()
    assert {name: len(trials) for name, trials in results.trials.items()} == {"baseline": 4, "DoesNothing": 4}
    best = min(results.trials["baseline"], key=lambda trial: trial["loss"])
    assert results.baseline_args["learning_rate"] == best["learning_rate"]
    assert tuning.SEED not in {run["seed"] for run in results.runs}
    assert "4 trials for every arm" in (tmp_path / "report.md").read_text()


def test_a_trial_or_three_are_no_tuning():
    given = Recipe(args={"learning_rate": 1e-3})
    few = Comparison([], workload="synthetic", baseline=given, tune=3)
    assert few.tuned == "" and Comparison([], workload="synthetic", tune=3).tuned == Synthetic.tuned
    assert Comparison([], workload="synthetic", baseline=given, tune=4).tuned.startswith("4 trials for every arm")


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match="tune\\(-1\\): must be 0 or more"):
        Comparison(["LinearToZero"], workload="code-lm", tune=-1)
    with pytest.raises(ValueError, match="seeds\\(1001\\): is the seed of tuning"):
        Comparison(["LinearToZero"], workload="code-lm", seeds=[1001])
