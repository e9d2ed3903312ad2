from __future__ import annotations

import json
from dataclasses import dataclass

import pandas
import pytest
from typer.testing import CliRunner

from hf_accel import Recipe, Technique
from hf_accel.cli import app
from hf_accel.cli.train import DEFAULT

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@dataclass(eq=False)
class Broken(Technique):
    """Fails as the host might: not with an error of ours."""

    def on_step_end(self, args, state, control, **kwargs):
        int("not a number")


@dataclass(eq=False)
class Killed(Technique):
    """Ends the process as Ctrl-C does, after some steps."""

    after: int = 5

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def recipe(tmp_path):
    """A run of 8 steps, as a file."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    path = tmp_path / "recipe.yaml"
    Recipe(
        task="causal-lm",
        model={"config": TINY},
        data={"source": str(tmp_path / "text.txt"), "context": 32},
        args={
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 0.5,
            "save_strategy": "steps",
            "save_steps": 0.25,
            "logging_steps": 0.25,
            "report_to": "none",
            "use_cpu": True,
        },
        budget="8steps",
    ).save(path)
    return path


def run(*line: object):
    return CliRunner().invoke(app, [str(word) for word in line])


def saved(folder):
    """Names, sizes and times of everything in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_a_run_ends_with_model_recipe_and_receipt(recipe, tmp_path):
    result = run("train", recipe)
    assert result.exit_code == 0, result.output
    for word in ("Receipt", "8steps", "eval_loss", "100%", "Model, recipe and receipt"):
        assert word in result.output.replace("\n", " "), word
    out = tmp_path / "out"
    assert json.loads((out / "receipt.json").read_text())["steps"] == 8
    assert {path.name for path in out.glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    }
    # The saved recipe runs again, and gives the same model.
    again = run("train", out / "recipe.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_what_was_saved_is_kept_and_resumed(recipe, tmp_path):
    out = tmp_path / "out"
    uninterrupted = run("train", recipe, "--output", tmp_path / "whole")
    assert uninterrupted.exit_code == 0, uninterrupted.output
    killed = run("train", recipe, "--set", f"techniques=['{__name__}:Killed']")
    assert killed.exit_code != 0
    before = saved(out)
    assert out / "checkpoint-4" in before

    refused = run("train", recipe)
    assert refused.exit_code == 2
    assert "of an earlier run. Add --resume to continue, or choose another --output." in refused.stderr
    assert saved(out) == before

    changed = run("train", recipe, "--resume")
    assert changed.exit_code == 2 and "Killed" in changed.stderr, "the techniques differ"
    assert saved(out) == before

    resumed = run("train", recipe, "--resume", "--allow-changes")
    assert resumed.exit_code == 0, resumed.output
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_an_error_that_is_not_ours_keeps_its_traceback(recipe):
    result = run("train", recipe, "--set", f"techniques=['{__name__}:Broken']")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError) and "not a number" in str(result.exception)


def test_sequence_classification(tmp_path):
    rows = pandas.DataFrame({"sentence": ["good", "bad"] * 16, "label": [1, 0] * 16})
    rows.to_parquet(tmp_path / "rows.parquet")
    config = TINY | {"model_type": "bert", "hidden_dropout_prob": 0.0}
    Recipe(
        task="sequence-classification",
        model={"config": config},
        data={"train": f"{tmp_path}/rows.parquet", "validation": f"{tmp_path}/rows.parquet", "text_column": "sentence"},
        args={"output_dir": str(tmp_path / "out"), "eval_strategy": "epoch", "report_to": "none", "use_cpu": True},
        budget="2epochs",
    ).save(tmp_path / "recipe.yaml")
    result = run("train", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "eval_accuracy" in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["none.yaml"], "recipe('none.yaml'): there is no such file."),
        (["--budget", "3 parsecs"], "Budget('3 parsecs'): there is no unit 'parsecs'."),
        (["--budget", "30"], "budget(30): must have a unit."),
        (["--set", "budget"], "set('budget'): must be 'key=value'."),
        (["--set", "args.learning_rat=1"], "Did you mean 'learning_rate'?"),
        (["--set", "args.learning_rate=fast"], "args.learning_rate('fast'): must be a float"),
        (["--set", "args.max_steps=5"], "max_steps"),
        (["--set", "techniques=[Budgte]"], "technique('Budgte'): there is no such technique. Did you mean 'Budget'?"),
        (["--set", "techniques=[Budget: {limt: 1s}]"], "Budget: there is no field 'limt'. Did you mean 'limit'?"),
        (["--set", "techniques=[Budget]"], "is a budget, too. Keep one."),
        (["--set", "budget=", "--set", "techniques=[Budget, Budget]"], "both own the slot 'budget'. Keep one."),
        (["--set", "data.source=none.txt"], "data('none.txt'): there is no such file."),
        (["--set", "data.source=EMPTY"], "the file is empty."),
        (["--set", "data.source=TABLE"], "has no column 'text'. Name one of those it has: 'sentence'."),
        (["--set", "data.sauce=x"], "data: there is no option 'sauce'. Did you mean 'source'?"),
        (["--set", "model=./none"], "model('./none'): neither a folder nor found on the Hub."),
        (["--set", "task=chess"], "task('chess'): there is no such task."),
        (["--resume"], "there is no checkpoint to resume from. Remove --resume."),
        (["--output", "EMPTY"], "is a file. Choose another --output."),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(line, message, recipe, tmp_path):
    places = {"EMPTY": str(tmp_path / "empty.txt"), "TABLE": str(tmp_path / "table.csv")}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "table.csv").write_text("sentence\nsome text\n")
    for name, path in places.items():
        line = [word.replace(name, path) for word in line]
    before = saved(tmp_path)
    result = run("train", *([] if line[0].endswith(".yaml") else [recipe]), *line)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert saved(tmp_path) == before, "nothing is written before the mistake is found"


def test_the_default_recipe_is_complete():
    recipe = Recipe.load(DEFAULT)
    assert recipe.task == "causal-lm" and recipe.data["source"] == "stdlib" and recipe.budget == "1min"
    assert recipe.training_arguments().save_strategy == "steps"
    assert run("--help").exit_code == 0 and run("train", "--help").exit_code == 0


def test_a_finished_run_goes_on(recipe, tmp_path):
    assert run("train", recipe).exit_code == 0
    onward = ("train", recipe, "--continue", tmp_path / "out", "--budget", "+4steps")
    refused = run(*onward)
    assert refused.exit_code == 2
    assert refused.stderr.rstrip().endswith("of an earlier run. Choose another --output.")
    result = run(*onward, "--output", tmp_path / "more")
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "more" / "receipt.json").read_text())
    assert (receipt["steps"], receipt["budget"], receipt["final_learning_rate"]) == (12, {"steps": 12.0}, 0.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--budget", "3 parsecs"), "there is no unit 'parsecs'"),
        (("--budget", "0.01s"), "too small for one step and the evaluation and checkpoint after it"),
        (("--budget", "10tok"), "too small for one step and the evaluation and checkpoint after it"),
        (("--budget", "1e4flop"), "too small for one step and the evaluation and checkpoint after it"),
        (("--budget", "1kWh"), "joules: "),
        (("--budget", "job"), "SLURM_JOB_START_TIME is not set"),
        (("--set", "args.max_steps=5"), "max_steps=5: Budget(limit='8steps') limits the run already"),
        (("--budget", "+4steps"), "there is no run to continue"),
        (("--continue", "elsewhere"), "needs a budget that extends the run. Add --budget +30min."),
        (("--continue", "elsewhere", "--budget", "+4steps"), "elsewhere: there is no complete checkpoint"),
    ],
)
def test_budgets_that_cannot_be_kept_are_one_sentence_before_training(options, sentence, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    monkeypatch.setattr("hf_accel.meters.energy.POWERCAP", tmp_path)
    result = run("train", recipe, *options)
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and sentence in said, result.output
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert said.count("error:") == 1


def test_a_budget_that_is_spent_is_one_sentence(recipe):
    assert run("train", recipe).exit_code == 0
    with pytest.warns(UserWarning, match=r"Budget\(limit='8steps'\): the run has spent this budget already"):
        assert run("train", recipe, "--resume").exit_code == 0
