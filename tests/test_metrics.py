"""`hf_accel.metrics`: the direction of a metric is declared, or the metric is refused."""

import pytest
from typer.testing import CliRunner

from hf_accel.cli import app
from hf_accel.compare import Comparison
from hf_accel.compare.workloads.synthetic import Synthetic
from hf_accel.metrics import greater_is_better

UNDECLARED = ("nll", "bpb", "fid", "exact_answer", "power", "contrastive_loss", "eval_answer")


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        *(("eval_loss", False), ("loss", False), ("eval_accuracy", True), ("f1", True)),
        *(("brier_score", False), ("eval_wer", False), ("eval_exact_match", True), ("runtime", False)),
    ],
)
def test_trainer_and_evaluate_declare_their_own(name, greater):
    assert greater_is_better(name) is greater
    assert greater_is_better(name, not greater) is not greater, "a declaration wins"


@pytest.mark.parametrize("name", UNDECLARED)
def test_nothing_is_guessed_from_a_name(name):
    with pytest.raises(ValueError, match="its direction is not declared. Set greater_is_better=True or False.$"):
        greater_is_better(name)
    assert greater_is_better(name, True) is True and greater_is_better(name, False) is False


class Scored(Synthetic):
    """A workload that declares the direction of its metric."""

    metric = "eval_bpb"
    greater_is_better = False


def test_a_comparison_takes_the_direction_from_the_workload_or_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Comparison(["LinearToZero"], workload=Scored()).lower_is_better
    assert not Comparison(["LinearToZero"], workload=Scored(), greater_is_better=True).lower_is_better
    assert not Comparison(["LinearToZero"], workload=Scored(), metric="accuracy").lower_is_better
    for name in ("nll", "bpb", "fid", "exact_answer"):
        with pytest.raises(ValueError, match=rf"metric\('{name}'\): its direction is not declared"):
            Comparison(["LinearToZero"], workload="synthetic", metric=name)
    told = Comparison(["LinearToZero"], workload="synthetic", metric="nll", greater_is_better=False)
    assert told.lower_is_better


def test_the_commands_take_the_direction_and_say_what_is_missing(tmp_path):
    line = ["compare", "LinearToZero", "--workload", "synthetic", "--metric", "nll", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 2 and refused.stderr.startswith("error: metric('nll'): its direction is not declared.")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("args: {}\n")
    refused = CliRunner().invoke(
        app, ["soup", "a", "b", "--out", str(tmp_path / "new"), "--greedy", "--recipe", str(recipe), "--metric", "bpb"]
    )
    assert refused.exit_code == 2 and refused.stderr.startswith("error: metric('bpb'): its direction is not declared.")
