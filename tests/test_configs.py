"""Every recipe that we ship can be followed."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app
from hf_accel.testing import tiny_llama
from hf_accel.tools.subjects import subject_of

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
    """Tables of images of one color, which is the class."""
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


@pytest.mark.ci  # it takes real seconds
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


def qlora(folder, *options):
    """``hf-accel train`` with the recipe of QLoRA, on a small model and a table of texts."""
    model = tiny_llama()
    model.resize_token_embeddings(256 + 3)  # bytes
    model.save_pretrained(folder / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "base")
    pandas.DataFrame({"text": [f"text {i}" * (1 + i % 5) for i in range(80)]}).to_parquet(folder / "texts.parquet")
    changes = {"model.path": folder / "base", "data.source": folder / "texts.parquet", "args.use_cpu": True}
    changes |= {"args.max_steps": 4, "args.output_dir": folder / "out", "techniques.LoRA.rank": 4}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    path = next(path for path in RECIPES if path.stem == "qlora")
    return CliRunner().invoke(app, ["train", str(path), *words, *options])


def test_qlora_trains_a_model_of_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="weights of 4 bits need it (pip install bitsandbytes)")
    result = qlora(tmp_path)
    assert result.exit_code == 0, result.output
    (lora, _) = json.loads((tmp_path / "out" / "receipt.json").read_text())["techniques"]
    assert lora["report"]["layers"] == 4 * 7
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # on the base model, which is not quantized
    assert adapted.model.layers[0].mlp.up_proj.lora_B["default"].weight.abs().max() > 0
    result = qlora(tmp_path, "--set", "techniques=[]", "--output", str(tmp_path / "other"))
    assert result.exit_code != 0 and "quantized weights, which are frozen, and no adapters" in result.output


def test_qlora_needs_a_model_and_what_quantizes_it(tmp_path):
    method = "model.quantization_config={quant_method: quanto, weights: int4}"
    result = qlora(tmp_path, "--set", method)
    message = re.sub(r"\s+", " ", result.output)
    assert result.exit_code != 0 and "error: model.quantization_config: Loading an optimum-quanto" in message
    path = next(path for path in RECIPES if path.stem == "qlora")
    with pytest.raises(ValueError, match="model.quantization_config: plan does not support it"):
        subject_of(str(path))
