"""Every recipe that we ship can be followed."""

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path, tmp_path):
    recipe = Recipe.load(path)
    arguments = recipe.with_changes("args.use_cpu=true").training_arguments()
    assert arguments.learning_rate == recipe.args["learning_rate"]
    techniques = recipe.build_techniques()
    assert techniques
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert recipe.task and recipe.data


def test_there_are_recipes():
    assert len(RECIPES) >= 2


def images(folder):
    """Tables of images of one colour, which is the class."""
    for name, number in (("train", 40), ("validation", 16)):
        rows = []
        for i in range(number):
            file = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 200 * (i % 2), np.uint8)).save(file, "PNG")
            rows.append({"image": file.getvalue(), "label": ("dark", "light")[i % 2]})
        pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return {f"data.{name}": folder / f"{name}.parquet" for name in ("train", "validation")}


def texts(folder):
    (folder / "text.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    return {"data.source": folder / "text.txt"}


@pytest.mark.parametrize("name", ["masked-lm", "causal-lm", "image-classification"])
def test_budgeted_recipes_run_in_time(name, tmp_path):
    """A smaller model, and a budget of seconds."""
    path = next(path for path in RECIPES if path.stem == f"budget-{name}")
    changes = images(tmp_path) if name == "image-classification" else texts(tmp_path)
    changes |= {
        "model.config.num_hidden_layers": 1,
        "model.config.hidden_size": 24,
        "model.config.intermediate_size": 32,
        "args.per_device_train_batch_size": 4,
        "args.per_device_eval_batch_size": 8,
        "args.output_dir": tmp_path / "out",
        "args.use_cpu": True,
    }
    if name == "causal-lm":
        changes["model.config.num_attention_heads"] = 2
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, ["train", str(path), "--budget", "4s", *options])
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["final_learning_rate"] == 0.0 and receipt["wall_seconds"] <= 4.5
