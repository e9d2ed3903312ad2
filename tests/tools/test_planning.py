"""Footprints of engines against sums written out, the choice among them, and the files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, ResNetConfig, ViTConfig

from hf_accel import Recipe
from hf_accel.recipe.yaml_io import load_yaml
from hf_accel.tools.planning import (
    BUCKET,
    ENGINES,
    Planner,
    Setting,
    accelerate_config,
    deepspeed_config,
    parse_bytes,
    write_configs,
)
from hf_accel.tools.subjects import subject_of

pytestmark = pytest.mark.ci

CONFIGS = Path(__file__).parents[2] / "configs"
D, F, N, V, L, B = 64, 160, 4, 500, 32, 2
BLOCK = 4 * D * D + 3 * D * F + 2 * D
OUTSIDE = 2 * V * D + D
TOTAL = N * BLOCK + OUTSIDE


@pytest.fixture
def llama(tmp_path):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=V, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def planner(model, devices=4, bf16=False):
    return Planner(subject_of(model, rows=B, length=L), devices=devices, bf16=bf16)


def test_in_single_precision(llama):
    """Weights, optimizer and buffers of each engine; activations and gradients are those of one trace."""
    plan = planner(llama)
    found = {engine: plan.footprint(Setting(engine)) for engine in ENGINES}
    weights, bucket = 4 * TOTAL, 4 * BUCKET
    expected = {  # of 4 devices: weights, optimizer, buffers, host
        "single": (weights, 2 * weights, weights, 0),
        "ddp": (weights, 2 * weights, weights, 0),
        "zero1": (weights, 12 * TOTAL / 4, bucket, 0),
        "zero2": (weights, 12 * TOTAL / 4, bucket, 0),
        "zero3": (weights / 4 + weights, 12 * TOTAL / 4, bucket, 0),
        "fsdp2": (weights / 4, 2 * weights / 4, 3 * 4 * (2 * BLOCK + OUTSIDE), 0),
        "fsdp2-offload": (0, 0, 3 * 4 * (2 * BLOCK + OUTSIDE), 4 * weights / 4),
        "zero3-offload": (weights, 0, bucket, (12 * TOTAL + 2 * weights) / 4),
    }
    for engine, values in expected.items():
        # Buffers of the model, the frequencies of positions, are a few bytes.
        seen = (found[engine].weights, found[engine].optimizer, found[engine].buffers, found[engine].host)
        assert seen == pytest.approx(values, rel=1e-3), engine
    passing = {engine: sum(found[engine][i] for i in (1, 3, 4)) for engine in ENGINES}
    assert passing["ddp"] == passing["zero1"] >= passing["zero2"]  # gradients, activations and logits


def test_sharded_blocks_are_gathered_one_after_another(tmp_path):
    """Where activations are most of it, one block is gathered when they are."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=V, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    plan = Planner(subject_of(str(tmp_path), rows=16, length=256), devices=4, bf16=False)
    found = plan.footprint(Setting("fsdp2"))
    assert found.buffers == pytest.approx(4 * (BLOCK + OUTSIDE), rel=1e-3)
    assert found.activations == plan.footprint(Setting("ddp")).activations


def test_of_one_device_nothing_is_in_shards(llama):
    plan = planner(llama, devices=1)
    assert {setting.engine for setting in plan.settings()} == {"single", "fsdp2-offload", "zero3-offload"}
    assert plan.footprint(Setting("single")).buffers == 0


def test_mixed_precision(llama):
    plan = planner(llama, bf16=True)
    copies, zero, fsdp = (plan.footprint(Setting(engine)) for engine in ("ddp", "zero2", "fsdp2"))
    assert copies.weights == pytest.approx(4 * TOTAL, rel=1e-3)
    assert zero.weights == pytest.approx(2 * TOTAL, rel=1e-3)
    assert fsdp.weights == pytest.approx(4 * TOTAL / 4, rel=1e-3)
    assert zero.activations < copies.activations  # which hold the weights that autocast has made smaller


def test_adapters_and_checkpointing_take_less(llama):
    plan = planner(llama)
    whole, adapters = plan.footprint(Setting("ddp")), plan.footprint(Setting("ddp", lora=True))
    trained = 16 * N * (4 * 2 * D + 3 * (D + F))
    assert adapters.optimizer == 2 * 4 * trained < whole.optimizer
    assert plan.footprint(Setting("ddp", checkpointing=True)).activations < whole.activations


def test_the_first_that_fits_is_recommended(llama):
    plan = planner(llama)
    settings = list(plan.settings())
    assert settings[0] == Setting("ddp")
    assert plan.recommend(1e12, settings) == Setting("ddp")
    assert plan.recommend(1, settings) is None
    memory = plan.footprint(Setting("ddp")).device / 0.9
    assert plan.recommend(memory, settings) == Setting("ddp")
    chosen = plan.recommend(memory * 0.99, settings)
    assert chosen is not None and chosen != Setting("ddp")
    assert plan.footprint(chosen).device <= memory * 0.99 * 0.9


def test_the_most_examples_that_fit(llama):
    plan, setting = planner(llama), Setting("ddp")
    memory = plan.footprint(setting, 12).device / 0.9 * (1 + 1e-6)
    assert plan.largest_rows(setting, memory) == 12


@pytest.mark.parametrize("rows", [2, 64])
def test_the_most_that_fit_where_few_take_no_more_than_the_update(llama, rows):
    plan, setting = Planner(subject_of(llama, rows=rows, length=8), devices=4, bf16=True), Setting("zero1")
    assert plan.footprint(setting, 1).device == plan.footprint(setting, 2).device
    memory = plan.footprint(setting, 40).device / 0.9 * (1 + 1e-6)
    assert plan.footprint(setting, 41).device > 0.9 * memory
    assert plan.largest_rows(setting, memory) in (39, 40)
    assert plan.largest_rows(setting, plan.footprint(setting, 1).device) == 0


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99),
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32),
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
    ],
    ids=lambda config: config.model_type,
)
def test_other_models(config, tmp_path):
    kind = {"bert": "BertForMaskedLM", "vit": "ViTForImageClassification", "resnet": "ResNetForImageClassification"}
    config.architectures = [kind[config.model_type]]
    config.save_pretrained(tmp_path)
    plan = Planner(subject_of(str(tmp_path), rows=2), devices=2)
    settings = list(plan.settings())
    assert all(plan.footprint(setting).device > 0 for setting in settings if not setting.lora)
    assert any(setting.checkpointing for setting in settings) == (config.model_type != "resnet")


def test_a_recipe_says_what_is_trained():
    path = CONFIGS / "recipes" / "pretrain.yaml"
    subject = subject_of(str(path))
    document = load_yaml(path.read_text())
    assert subject.length == document["data"]["context"]
    assert subject.rows == document["args"]["per_device_train_batch_size"]
    assert Planner(subject, devices=1).footprint(Setting("single")).device > 0


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "single"])
def test_files_are_those_that_we_ship(engine):
    """Which are tested to run."""
    shipped = load_yaml((CONFIGS / "accelerate" / f"{engine}.yaml").read_text())
    deepspeed = Path("configs", "deepspeed", f"{engine}.json")
    setting = Setting(engine, checkpointing=engine == "fsdp2-offload")
    assert accelerate_config(setting, 2, True, deepspeed) == shipped
    if engine.startswith("zero"):
        assert deepspeed_config(setting) == json.loads((CONFIGS.parent / deepspeed).read_text())


def test_files_lead_to_each_other(tmp_path):
    written = write_configs(tmp_path / "plan", Setting("zero3-offload"), 8, True)
    accelerate = load_yaml(written[0].read_text())
    assert Path(accelerate["deepspeed_config"]["deepspeed_config_file"]) == written[1]
    assert accelerate["num_processes"] == 8
    written = write_configs(tmp_path / "other", Setting("fsdp2", checkpointing=True), 2, False)
    fsdp = load_yaml(written[0].read_text())
    assert len(written) == 1 and fsdp["fsdp_config"]["fsdp_activation_checkpointing"]
    assert fsdp["mixed_precision"] == "no"


# What cannot be planned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("24GiB", 24 * 2**30), ("1.5t", 1.5e12), ("512 MB", 512e6)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "-1GB", "8 apples", "1.2.3GB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ValueError, match=r"memory\(.*not an amount of memory"):
        parse_bytes(text)


def test_too_long(llama):
    with pytest.raises(ValueError, match=r"length\(999999\): llama has 2048 positions"):
        subject_of(llama, length=999999)


def test_an_unknown_kind_of_model(tmp_path):
    BertConfig(architectures=["BertForQuestionAnswering"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="plan does not support BertForQuestionAnswering, only language models"):
        subject_of(str(tmp_path))


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="neither a path nor found on the Hub"):
        subject_of(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="configuration cannot be read"):
        subject_of(str(tmp_path))


def test_the_type_of_the_weights_is_that_of_the_configuration(tmp_path):
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    assert subject_of(str(tmp_path)).dtype is torch.bfloat16
    for model, dtype in [
        (str(tmp_path), torch.float32),
        ({"path": str(tmp_path), "dtype": "bfloat16"}, torch.bfloat16),
    ]:
        Recipe("causal-lm", model, {"source": "text"}).save(tmp_path / "recipe.yaml")
        subject = subject_of(str(tmp_path / "recipe.yaml"), rows=1, length=4)
        with torch.device("meta"):
            assert subject.dtype is next(subject.build().parameters()).dtype is dtype
