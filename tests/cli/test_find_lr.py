from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app
from hf_accel.updates.learning_rates import index_of, rate_at

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def recipe(tmp_path):
    """A run of 100 steps, as a file."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    path = tmp_path / "recipe.yaml"
    Recipe(
        task="causal-lm",
        model={"config": TINY},
        data={"source": str(tmp_path / "text.txt"), "context": 32},
        args={
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "warmup_steps": 0.1,
            "report_to": "none",
            "use_cpu": True,
        },
        budget="100steps",
    ).save(path)
    return path


def run(*line: object):
    return CliRunner().invoke(app, [str(word) for word in line])


@pytest.mark.ci
def test_a_recipe_gets_a_proposal_and_a_plot(recipe, tmp_path):
    result = run("find-lr", recipe, "--out", tmp_path / "found", "--share", 1)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found" / "find-lr.json").read_text())
    rate = found["learning_rate"]
    assert f"Proposed: args.learning_rate={rate:g}" in result.stdout.replace("\n", " ")
    assert rate == rate_at(index_of(rate)) and found["given"] == 5e-5
    assert found["cost"] <= 1 and found["horizon_steps"] == 100
    assert min(map(float, found["rounds"][1]["losses"])) / 2 < rate <= max(map(float, found["rounds"][1]["losses"]))
    assert (tmp_path / "found" / "find-lr.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out").exists()

    # What it prints for programs is the same.
    again = run("find-lr", recipe, "--out", tmp_path / "again", "--share", 1, "--no-plot", "--json")
    assert json.loads(again.stdout) | {"seconds": 0} == found | {"seconds": 0}
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["find-lr.json"]


@pytest.mark.ci
def test_a_workload_has_a_recipe_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["find-lr", "--workload", "synthetic", "--budget", "800samples", "--share", 1, "--no-plot", "--json"]
    result = run(*line, "--set", "args.learning_rate=1e-2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["given"] == 1e-2 and found["horizon_steps"] == 100
    assert (tmp_path / "accel_output" / "find-lr-synthetic" / "find-lr.json").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ([], "find-lr needs a recipe or a workload"),
        (["--workload", "sst3"], "workload('sst3'): there is none of this name"),
        (["--workload", "sst2", "--data", "nowhere"], "there is no such file"),
        (["nothing.yaml"], "recipe('nothing.yaml'): there is no such file"),
        (["--workload", "synthetic", "--share", "0"], "share must be > 0"),
        (["--workload", "synthetic", "--share", "0.5"], "a search needs"),
        (["--workload", "synthetic", "--budget", "3 parsecs"], "no unit 'parsecs'"),
        (["--workload", "synthetic", "--out", __file__], "is a file"),
    ],
)
def test_mistakes_end_in_one_sentence(line, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ACCEL_DATA", "elsewhere")
    result = run("find-lr", *line)
    assert result.exit_code == 2, result.output
    words = " ".join(result.stderr.split())
    assert sentence in words and words.startswith("error: ") and "Traceback" not in words
