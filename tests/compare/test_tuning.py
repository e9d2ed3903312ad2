from __future__ import annotations

import math

import pytest
from transformers import TrainingArguments

from hf_accel import Recipe
from hf_accel.compare import Arm, Comparison, tuning
from hf_accel.compare.tuning import Search, options
from hf_accel.compare.workloads.synthetic import Synthetic


def arm(*techniques, **args) -> Arm:
    return Arm("an arm", Recipe(args={"learning_rate": 1e-3} | args, techniques=list(techniques)))


def searched(given: Arm, outcome, trials: int, slope: float = 0.0) -> Search:
    search = Search(options(given), trials, slope)
    while points := search.proposals():
        for point in points:
            assert point not in search.outcomes
            found = outcome(search.values(point))
            search.outcomes[point] = found if isinstance(found, tuple) else (found, 1.0)
    return search


def chosen(search: Search) -> dict:
    return search.values(search.best)


def bowl(values: dict) -> float:
    """Lowest at a learning rate of 0.0057, a batch of 2, grouping, a weight decay of 0.1 and a beta2 of 0.98."""
    rate, batch = values["learning_rate"], values["per_device_train_batch_size"]
    grouped = values.get("train_sampling_strategy", "group_by_length") == "group_by_length"
    others = abs(values["weight_decay"] - 0.1) + abs(values["adam_beta2"] - 0.98) + (not grouped)
    return math.log2(rate / 0.0057) ** 2 + 0.5 * math.log2(batch / 2) ** 2 + others


def test_the_search_ends_at_the_lowest_point_of_a_bowl():
    search = searched(arm(), bowl, trials=60)
    assert chosen(search) == {
        "learning_rate": 5.66e-3,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "group_by_length",
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
    }
    assert len(search.outcomes) < 30, "it stops where no neighbor is better"


def test_a_walk_ends_one_step_beyond_the_best():
    tried = [trial["per_device_train_batch_size"] for trial in searched(arm(), bowl, trials=60).record()]
    assert {16, 8, 4, 2, 1} == set(tried), "both sides of the start, then down to the best and one beyond"
    rates = {trial["learning_rate"] for trial in searched(arm(), bowl, trials=60).record()}
    assert {4e-3, 5.66e-3, 8e-3} <= rates


@pytest.mark.parametrize("trials", [1, 2, 3, 8])
def test_every_arm_has_its_number_of_trials(trials):
    search = searched(arm(), bowl, trials)
    assert len(search.record()) == trials
    first = search.record()[0]
    assert first["learning_rate"] == 1e-3 and first["per_device_train_batch_size"] == 8
    assert first["loss"] == pytest.approx(bowl(first)) and first["cost"] == 1.0


def test_what_counts_as_tuning_varies_every_free_option():
    flat = searched(arm(), lambda values: 1.0, trials=tuning.TRIALS)
    assert len(flat.record()) <= tuning.TRIALS
    names = ("learning_rate", "per_device_train_batch_size", *tuning.CHOICES)
    assert all(len({trial[name] for trial in flat.record()}) > 1 for name in names)


def test_batches_are_whole_and_failures_are_infinitely_bad():
    def outcome(values):
        return values["per_device_train_batch_size"] if values["learning_rate"] < 3e-3 else math.inf

    search = searched(arm(per_device_train_batch_size=3), outcome, trials=20)
    assert {trial["per_device_train_batch_size"] for trial in search.record()} <= {3, 6}
    assert chosen(search)["learning_rate"] < 3e-3


def test_an_option_that_saves_time_and_no_loss_wins_by_the_slope():
    def outcome(values):
        return 2.0, 0.5 if values["train_sampling_strategy"] == "group_by_length" else 1.0

    assert chosen(searched(arm(), outcome, trials=20))["train_sampling_strategy"] == "random"
    assert chosen(searched(arm(), outcome, trials=20, slope=0.3))["train_sampling_strategy"] == "group_by_length"


def test_the_slope_is_that_of_the_baseline_between_half_its_horizon_and_the_whole():
    asked = []

    def train(arms):
        asked.append([(one.name, one.horizon) for one in arms])
        return [(2.0 - 0.4 * math.log(one.horizon), 10 * one.horizon) for one in arms]

    baseline = Arm("baseline", Recipe(), "baseline")
    found = tuning.tune([baseline, arm()], 2, train)
    assert asked[0] == [("baseline, as given", 1.0), ("baseline, as given", 0.5)]
    assert all(search.slope == pytest.approx(0.4) for search in found.values())
    flat = tuning.tune([baseline], 1, lambda arms: [(math.inf, math.nan) for _ in arms])
    assert flat["baseline"].slope == 0.0


def test_two_fields_of_the_techniques_are_varied_within_their_bounds():
    found = {option.name: option for option in options(arm({"Muon": {"lr": 0.04, "momentum": 0.8}}))}
    assert [name for name in found if "." in name] == ["Muon.lr", "Muon.momentum"]
    assert found["Muon.lr"].value(0) == 0.04 and found["Muon.lr"].value(1) == pytest.approx(0.0769)
    assert [found["Muon.momentum"].value(step) for step in (-1, 1)] == [0.667, 0.889]
    (whole,) = (option for option in options(arm("LengthGrouped")) if "." in option.name)
    assert whole.name == "LengthGrouped.mega_batch" and [whole.value(step) for step in (-1, 0, 1)] == [25, 50, 100]
    tried = searched(arm("LengthGrouped"), lambda values: -values["LengthGrouped.mega_batch"], trials=30)
    changed = arm("LengthGrouped").changed(chosen(tried))
    assert changed.recipe.techniques == [{"LengthGrouped": {"mega_batch": chosen(tried)["LengthGrouped.mega_batch"]}}]
    assert chosen(tried)["LengthGrouped.mega_batch"] > 50 and "LengthGrouped.mega_batch" not in changed.recipe.args


def test_an_arm_is_not_searched_for_what_its_techniques_replace():
    assert "train_sampling_strategy" in {option.name for option in options(arm("ExponentialMovingAverage"))}
    for streamed in ("LengthGrouped", "InfoBatch"):
        assert "train_sampling_strategy" not in {option.name for option in options(arm(streamed))}
    grouped = Arm("an arm", Recipe(techniques=["InfoBatch"])).inherit({"train_sampling_strategy": "group_by_length"})
    assert "train_sampling_strategy" not in grouped.recipe.args, "its stream orders the examples"


def test_fused_adamw_is_what_every_arm_has():
    assert TrainingArguments("out").optim == "adamw_torch_fused"


@pytest.mark.full  # a minute
def test_arms_are_tuned_alike_and_reported_with_other_seeds(tmp_path):
    comparison = Comparison(
        ["hf_accel.compare.workloads.synthetic:DoesNothing"],
        workload=Synthetic(seconds=0.05),
        horizons=(0.5, 1.0),
        seeds=2,
        tune=10,
        placebos=False,
        out=tmp_path,
    )
    results = comparison.run()
    assert {name: len(trials) for name, trials in results.trials.items()} == {"baseline": 10, "DoesNothing": 10}
    given = {name: results.baseline_args[name] for name in ("learning_rate", "weight_decay", "adam_beta2")}
    assert any(given.items() <= trial.items() for trial in results.trials["baseline"])
    assert tuning.SEED not in {run["seed"] for run in results.runs}
    assert "10 trials for every arm" in (tmp_path / "report.md").read_text()


def test_a_few_trials_are_no_tuning():
    given = Recipe(args={"learning_rate": 1e-3})
    few = Comparison([], workload="synthetic", baseline=given, tune=9)
    assert few.tuned == "" and Comparison([], workload="synthetic", tune=9).tuned == Synthetic.tuned
    assert Comparison([], workload="synthetic", baseline=given, tune=10).tuned.startswith("10 trials for every arm")


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match="tune\\(-1\\): must be 0 or more"):
        Comparison(["LinearToZero"], workload="code-lm", tune=-1)
    with pytest.raises(ValueError, match="seeds\\(1001\\): is the seed of tuning"):
        Comparison(["LinearToZero"], workload="code-lm", seeds=[1001])
