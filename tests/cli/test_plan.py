from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app
from hf_accel.recipe.yaml_io import load_yaml


@pytest.fixture
def model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=99, max_position_embeddings=64, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *line: CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", *map(str, line)])


@pytest.mark.ci
def test_tables_words_and_files(model, run, tmp_path):
    result = run(model, "--devices", 4, "--memory", "24GB", "--batch", 2, "--output", "here")
    assert result.exit_code == 0, result.output
    assert "model: 2 x 64 tokens a device, 4 x 24GB, AdamW" in result.stdout
    assert "Use ddp, all weights:" in result.stdout
    assert "accelerate launch --config_file here/accelerate.yaml train.py" in result.stdout
    assert load_yaml((tmp_path / "here" / "accelerate.yaml").read_text())["num_processes"] == 4
    for engine in ("ddp", "zero1", "zero2", "fsdp2", "zero3", "fsdp2-offload", "zero3-offload"):
        assert f"│ {engine} " in result.stdout
    assert "│ activations │" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.ci
def test_nothing_fits(model, run, tmp_path):
    result = run(model, "--memory", "1MB")
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())
    assert "Nothing fits: the smallest setting (" in words and "Lower --batch or --length" in words
    assert not (tmp_path / "accel_plan").exists()


@pytest.mark.ci
def test_for_programs(model, run):
    result = run(model, "--devices", 2, "--memory", "1TB", "--json")
    found = json.loads(result.stdout)
    assert found["recommended"] == {"engine": "ddp", "checkpointing": False, "lora": False}
    first = found["settings"][0]
    assert first["fits"] and first["device_bytes"] == sum(
        size for part, size in first["bytes"].items() if part != "host"
    )


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["nowhere"], "error: model('nowhere'): neither a path nor found on the Hub. Check the path."),
        (["model", "--memory", "much"], "error: memory('much'): not an amount of memory."),
        (["model", "--length", "65"], "error: length(65): model has 64 positions. Give at most 64."),
        (["model", "--output", "model/config.json"], "error: output('model/config.json'): is a file."),
        (["nowhere.yaml"], "error: recipe('nowhere.yaml'): there is no such file. Check the path."),
    ],
)
def test_mistakes(model, run, line, sentence):
    result = run(*line)
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.output


# With a budget -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    recipe = Recipe(
        task="causal-lm",
        model={"config": config | {"num_attention_heads": 2, "max_position_embeddings": 32}},
        data={"source": str(tmp_path / "text.txt"), "context": 32},
        args={"per_device_train_batch_size": 4, "learning_rate": 1e-3, "eval_strategy": "epoch", "use_cpu": True},
        techniques=["InfoBatch"],
    )
    recipe.save(tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("hf_accel.cli.plan.CALIBRATION_SECONDS", 0.5)


@pytest.mark.ci
def test_what_fits_in_a_budget(recipe, run, tmp_path):
    result = run(recipe, "--budget", "40steps", "--batch", 16)
    assert result.exit_code == 0, result.output
    assert "Work within 40steps" in result.stdout
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.stdout.splitlines() if "│" in line
    }
    assert rows["updates"] == "40" and rows["examples per update"] == "16"
    assert int(rows["samples"]) == pytest.approx(40 * 16, rel=0.1)  # the last of an epoch are fewer
    assert rows["peak learning rate"] == "0.002 (sqrt rule, 4 x the batch)"
    assert rows["duration"].endswith(" s")
    assert not list(tmp_path.glob("tmp_trainer*")) and not (tmp_path / "accel_output").exists()


@pytest.mark.ci
def test_what_fits_in_a_time_for_programs(recipe, run):
    result = run(recipe, "--budget", "2h", "--devices", 2, "--json")
    found = json.loads(result.stdout)["budget"]
    assert 0.99 * 7200 < found["seconds"] <= 7200
    assert found["batch"] == 8 and found["samples"] == pytest.approx(8 * found["steps"], rel=0.2)
    assert found["learning_rate"] == pytest.approx(1e-3 * 2**0.5)


def test_epochs_of_several_devices_are_evaluated_as_often(recipe, run):
    found = json.loads(run(recipe, "--budget", "2epochs", "--devices", 4, "--json").stdout)["budget"]
    evaluations = found["steps"] * found["forecast"]["evaluations"]["each_step"]
    assert evaluations == pytest.approx(found["epochs"]) and found["epochs"] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["model", "--budget", "2h"], "error: budget('2h') needs the data of a recipe, and model is not a recipe."),
        (["recipe.yaml", "--budget", "3 moons"], "error: Budget('3 moons'): there is no unit 'moons'."),
        (["recipe.yaml", "--budget", "0.001s"], "error: budget: the start, one step and the evaluations take"),
    ],
)
def test_budgets_that_are_none(model, recipe, run, line, sentence):
    result = run(*line)
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.output
