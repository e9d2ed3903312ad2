from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from hf_accel.cli import app
from hf_accel.notation import load_yaml


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


def test_tables_words_and_files(model, run, tmp_path):
    result = run(model, "--devices", 4, "--memory", "24GB", "--batch", 2, "--output", "here")
    assert result.exit_code == 0, result.output
    assert "model: 2 x 64 tokens a device, 4 x 24GB, AdamW" in result.stdout
    assert "Take ddp, all weights:" in result.stdout
    assert "accelerate launch --config_file here/accelerate.yaml train.py" in result.stdout
    assert load_yaml((tmp_path / "here" / "accelerate.yaml").read_text())["num_processes"] == 4
    for engine in ("ddp", "zero1", "zero2", "fsdp2", "zero3", "fsdp2-offload", "zero3-offload"):
        assert result.stdout.count(f"│ {engine} ") == 2
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_nothing_fits(model, run, tmp_path):
    result = run(model, "--memory", "1MB")
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())
    assert "Nothing fits: the least is" in words and "Take fewer --batch or --length" in words
    assert not (tmp_path / "accel_plan").exists()


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
        (["model", "--length", "65"], "error: length(65): model has 64 positions. Give at most these."),
        (["model", "--output", "model/config.json"], "error: output('model/config.json'): is a file."),
        (["nowhere.yaml"], "error: recipe('nowhere.yaml'): there is no such file. Check the path."),
    ],
)
def test_mistakes(model, run, line, sentence):
    result = run(*line)
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.output
