"""Soups, by the library's functions and by ``hf-accel soup``."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app
from hf_accel.testing import tiny_convnext, tiny_llama
from hf_accel.tools.soup import greedy, soup

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it

IDS = torch.arange(3, 35).view(2, 16)


def run(*line: object):
    return CliRunner().invoke(app, ["soup", *map(str, line)], env={"COLUMNS": "200"})


def models(directory, number=3, dtype=torch.float32):
    """Llamas of different weights, as folders."""
    folders = []
    for seed in range(number):
        folders.append(directory / f"model{seed}")
        tiny_llama(dtype=dtype, seed=seed).save_pretrained(folders[-1])
    return folders


def adapter(folder, seed, config):
    """An adapter that does something, of the tiny Llama, and the model with it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def merged(model):
    """The weights of the base model with the adapter's change."""
    state = copy.deepcopy(model).merge_and_unload().state_dict()
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_soup_is_the_mean(dtype, tmp_path):
    folders = models(tmp_path, dtype=dtype)
    result = run(*folders, "--out", tmp_path / "soup")
    assert result.exit_code == 0, result.output
    assert "The mean of 3 is in" in result.output
    states = [tiny_llama(dtype=dtype, seed=seed).state_dict() for seed in range(3)]
    for name, mean in LlamaForCausalLM.from_pretrained(tmp_path / "soup").state_dict().items():
        assert mean.dtype == dtype
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-7)


CONFIGS = {
    "plain": [LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])] * 2,
    "ranks, alphas and a whole module": [
        LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    ],
    "patterns and rank-stabilized": [
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 3}),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True),
    ],
    "embeddings": [LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])] * 2,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_soup_of_adapters_changes_the_weights_by_the_mean_of_their_changes(name, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    apart = [
        adapter(folder, seed, copy.deepcopy(config))
        for seed, (folder, config) in enumerate(zip(folders, CONFIGS[name], strict=True))
    ]
    soup(folders, tmp_path / "soup")
    together = PeftModel.from_pretrained(tiny_llama(), tmp_path / "soup").eval()
    states = [merged(model) for model in apart]
    for key, weight in merged(together).items():
        torch.testing.assert_close(weight, (states[0][key] + states[1][key]) / 2, rtol=1e-5, atol=1e-6)

    logits = together(input_ids=IDS).logits
    mean = tiny_llama().eval()
    mean.load_state_dict({key: ((states[0][key] + states[1][key]) / 2).float() for key in states[0]})
    torch.testing.assert_close(logits, mean(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    # The mean of A times the mean of B is something else.
    assert not torch.allclose(logits, apart[0](input_ids=IDS).logits, rtol=1e-2)


def test_a_greedy_soup_adds_what_does_not_make_it_worse(tmp_path):
    folders = models(tmp_path, 4)
    weights = [tiny_llama(seed=seed).lm_head.weight for seed in range(4)]
    target = (weights[1] + weights[2]).detach() / 2

    def evaluate(folder):
        return float((LlamaForCausalLM.from_pretrained(folder).lm_head.weight.detach() - target).square().mean())

    for sign in (1, -1):
        scores = {folder: sign * evaluate(folder) for folder in folders}
        kept, score = greedy(scores, lambda folder, sign=sign: sign * evaluate(folder), sign == 1)
        assert set(kept) == {folders[1], folders[2]}
        assert sign * score == pytest.approx(0, abs=1e-9)


def test_a_recipe_decides_what_a_greedy_soup_keeps(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Recipe(
        task="causal-lm",
        model={"config": {"model_type": "llama", **sizes}},
        data={"source": str(tmp_path / "text.txt"), "context": 32},
        args={"output_dir": str(tmp_path / "out"), "use_cpu": True},
    ).save(tmp_path / "recipe.yaml")
    good = LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes))
    bad = copy.deepcopy(good)
    torch.nn.init.zeros_(good.lm_head.weight)  # all equally likely
    torch.nn.init.normal_(bad.lm_head.weight, std=5)
    for name, model in (("bad", bad), ("good", good)):
        model.save_pretrained(tmp_path / name)
    line = [tmp_path / "bad", tmp_path / "good", "--out", tmp_path / "soup"]
    result = run(*line, "--greedy", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "Greedy soup: loss 5.5568" in result.output  # log 259
    assert "The mean of 1 is in" in result.output
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "soup").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in good.state_dict().items())

    refused = run(*line[:3], tmp_path / "other", "--greedy", "--recipe", tmp_path / "recipe.yaml", "--metric", "bleu")
    assert refused.exit_code == 2 and "metric('bleu'): the evaluation does not report it." in refused.stderr


def test_a_greedy_soup_keeps_what_is_more_accurate(tmp_path):
    for name, labels in (("train", ["a", "b"] * 4), ("validation", ["b"] * 8)):
        rows = [f"text {i},{label}\n" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Recipe(
        task="sequence-classification",
        model={"config": {"model_type": "bert", **sizes}},
        data={name: str(tmp_path / f"{name}.csv") for name in ("train", "validation")},
        args={"output_dir": str(tmp_path / "out"), "use_cpu": True},
    ).save(tmp_path / "recipe.yaml")
    model = BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=2, **sizes))
    torch.nn.init.zeros_(model.classifier.weight)
    for name, bias in (("wrong", [1.0, -1.0]), ("right", [-1.0, 1.0])):  # the first class wherever they are equal
        model.classifier.bias.data = torch.tensor(bias)
        model.save_pretrained(tmp_path / name)
    line = [tmp_path / "wrong", tmp_path / "right", "--out", tmp_path / "soup", "--greedy"]
    result = run(*line, "--recipe", tmp_path / "recipe.yaml", "--metric", "accuracy")
    assert result.exit_code == 0, result.output
    assert "Greedy soup: accuracy 1" in result.output and "The mean of 1 is in" in result.output
    kept = BertForSequenceClassification.from_pretrained(tmp_path / "soup")
    assert kept.classifier.bias.tolist() == [-1.0, 1.0]


def test_bad_input_ends_in_one_sentence_and_exit_code_2(tmp_path):
    llama, other = models(tmp_path, 2)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=48, **sizes))
    small.save_pretrained(tmp_path / "small")
    tiny_convnext().save_pretrained(tmp_path / "convnext")
    for name, config in (
        ("lora", LoraConfig(r=2, target_modules=["q_proj"])),
        ("v", LoraConfig(r=2, target_modules=["v_proj"])),
        ("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    ):
        adapter(tmp_path / name, 0, config)
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "out"]
    for line, message in (
        ([llama, tmp_path / "convnext", *out], "is a ConvNextForImageClassification, but"),
        ([llama, tmp_path / "small", *out], "model.embed_tokens.weight is (48, 8), but "),
        ([llama, tmp_path / "lora", *out], "Give only models or only adapters."),
        ([tmp_path / "lora", tmp_path / "v", *out], "q_proj.lora_A.weight is missing, but "),
        ([tmp_path / "lora", tmp_path / "dora", *out], "soup does not support use_dora because it has no exact mean."),
        ([llama, tmp_path / "empty", *out], "holds no model (config.json)."),
        ([llama, other, "--greedy", *out], "--greedy and --recipe need each other. Give both or neither."),
        ([llama, other, "--out", llama], "exists and is not an empty folder. Choose another --out."),
    ):
        result = run(*line)
        assert result.exit_code == 2, (line, result.output)
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "out").exists()


def test_adapters_that_change_their_base_model_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    for seed in (0, 1):
        adapter(tmp_path / str(seed), seed, config)
    result = run(tmp_path / "0", tmp_path / "1", "--out", tmp_path / "soup")
    assert result.exit_code == 2 and "init_lora_weights='pissa' because it has no exact mean" in result.output
