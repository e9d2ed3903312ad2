from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from typer.testing import CliRunner

from hf_accel import ExponentialMovingAverage
from hf_accel.cli import app
from hf_accel.testing import collate_padded, tiny_llama, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it


def run(*line: object):
    return CliRunner().invoke(app, ["export", *map(str, line)])


def trained(directory, techniques=(), model=None):
    """Checkpoint 2 of 4 steps."""
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(list(techniques), directory, model=model or tiny_llama(), **args)
    trainer.processing_class = ByT5Tokenizer(extra_ids=0)
    trainer.data_collator = collate_padded
    trainer.train()
    return directory / "checkpoint-2"


def lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        return get_peft_model(tiny_llama(), config)


def test_the_averaged_model_loads_as_any_other(tmp_path):
    checkpoint = trained(tmp_path, [ExponentialMovingAverage(3.0)])
    result = run(checkpoint)
    assert result.exit_code == 0, result.output
    out = tmp_path / "averaged-2"
    assert str(out) in result.output
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert not [path for path in out.iterdir() if path.name.startswith(("accel_", "optimizer", "trainer_"))]
    averages, raw = load_file(checkpoint / "averaged.safetensors"), load_file(checkpoint / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(exported[name], average) for name, average in averages.items())
    assert not torch.equal(exported["lm_head.weight"], raw["lm_head.weight"])


def test_an_averaged_adapter_stays_an_adapter(tmp_path):
    checkpoint = trained(tmp_path, [ExponentialMovingAverage(3.0)], lora())
    result = run(checkpoint, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    averages = load_file(checkpoint / "averaged.safetensors")
    assert {name.rpartition(".default")[2] for name in averages} == {".weight"}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], average) for name, average in averages.items())
    raw = load_file(checkpoint / "adapter_model.safetensors")
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert exported.keys() == raw.keys() and not any(torch.equal(exported[name], raw[name]) for name in raw)


def test_bad_input_ends_in_one_sentence_and_exit_code_2(tmp_path):
    plain = trained(tmp_path / "plain")
    averaged = trained(tmp_path / "averaged", [ExponentialMovingAverage(3.0)])
    broken = trained(tmp_path / "broken", [ExponentialMovingAverage(3.0)])
    (broken / "accel_complete.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for line, message in (
        ([tmp_path / "none"], "there is no checkpoint. Name a checkpoint-N directory."),
        ([plain], "holds no averaged weights. Load it with from_pretrained."),
        ([broken], "the checkpoint is not complete: it has no accel_complete.json."),
        ([averaged, "--out", tmp_path / "full"], "exists and is not an empty folder. Choose another --out."),
    ):
        result = run(*line)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
