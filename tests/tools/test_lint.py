from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_accel.cli import app
from hf_accel.tools.lint import DEPRECATED_OF_ZERO, REMOVED, REMOVED_OF_ZERO, lint, of_accelerate, of_deepspeed

CONFIGS = Path(__file__).parents[2] / "configs"
OURS = [*(CONFIGS / "accelerate").glob("*.yaml"), *(CONFIGS / "deepspeed").glob("*.json")]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_what_we_ship_is_clean(path):
    assert lint(path) == []


@pytest.mark.parametrize("key", REMOVED)
def test_deepspeed_refuses_what_we_say_it_refuses(key):
    config = pytest.importorskip("deepspeed.runtime.config")
    with pytest.raises(config.DeepSpeedConfigError):
        config.DeepSpeedConfig({"train_batch_size": 1, key: {"enabled": True}})
    assert any(key in sentence for sentence in of_deepspeed({key: {"enabled": True}}))


@pytest.mark.parametrize("key", REMOVED_OF_ZERO)
def test_keys_of_zero_that_are_gone(key):
    assert any(key in sentence for sentence in of_deepspeed({"zero_optimization": {"stage": 2, key: 1}}))
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    with pytest.raises(ValueError, match=f"{key}\n.*not permitted"):
        config.DeepSpeedZeroConfig(**{key: True})


@pytest.mark.parametrize("key", DEPRECATED_OF_ZERO)
def test_keys_of_zero_that_are_deprecated(key, caplog):
    (sentence,) = of_deepspeed({"zero_optimization": {"stage": 2, key: True}})
    assert f"{key}: is deprecated" in sentence
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    config.DeepSpeedZeroConfig(stage=2, **{key: True})
    assert f"{key} is deprecated" in caplog.text


def test_nothing_is_offloaded_to_none():
    offloads = {"offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    assert of_deepspeed({"zero_optimization": {"stage": 0, **offloads}}) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both are enabled"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "only stage 3"),
        ({"zero_optimization": {"stage": 3}}, "writes no weights"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1 or higher"),
        ({"train_batch_size": 32}, 'Write "auto"'),
        ({"scheduler": {"type": "WarmupLR"}}, "not the budget"),
        ({"optimizer": {"type": "OneBitAdam"}}, "Use 'AdamW'"),
    ],
)
def test_contradictions_in_deepspeed(config, said):
    (sentence,) = of_deepspeed(config)
    assert said in sentence


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "Set fsdp_version: 2"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_sharding_strategy": "FULL_SHARD"}},
            "fsdp_reshard_after_forward",
        ),
        ({"distributed_type": "MULTI_GPU", "fsdp_config": {"fsdp_version": 2}}, "Set distributed_type: FSDP"),
        ({"distributed_type": "MULTI_GPU", "deepspeed_config": {"zero_stage": 2}}, "Set distributed_type: DEEPSPEED"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, "address of the first"),
        ({"distributed_type": "NO", "num_processes": 4}, "Set distributed_type: MULTI_GPU"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "x", "zero_stage": 2}},
            "Keep it in one place",
        ),
    ],
)
def test_contradictions_in_accelerate(config, said):
    (sentence,) = of_accelerate(config)
    assert said in sentence


def test_the_command_counts_what_it_found(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"progressive_layer_drop": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    done = CliRunner().invoke(app, ["doctor", str(path)])
    assert done.exit_code == 1 and "2 found" in done.output and "hf_accel.ProgressiveLayerDrop" in done.output
    path.write_text("{")
    done = CliRunner().invoke(app, ["doctor", str(path)])
    assert done.exit_code == 2 and "cannot be read" in " ".join(done.output.split())
