"""Larger models that begin as the function of a smaller one."""

import copy
import logging

import pytest
import torch
from architectures import inputs_for, tiny, used
from torch import nn

from hf_accel import ExpandFrom
from hf_accel.model.initialization.expand_from import shared_out
from hf_accel.testing import VOCABULARY, tiny_llama, tiny_trainer

WIDE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1}
WIDE_GROUPED = WIDE | {"num_key_value_heads": 3}
MASKED = ("BERT", "RoBERTa")


def exact(model):
    """The model with norms that compute in its own type, and not in float32."""
    for path, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model.eval()


def logits(name, model):
    with torch.no_grad():
        return exact(copy.deepcopy(model))(**inputs_for(name)).logits


def expanded(technique, name, small, directory, **sizes):
    """What a trainer makes of a fresh model of these sizes, before its first step."""
    small.save_pretrained(directory / "small")
    technique.checkpoint = str(directory / "small")
    model = tiny(name, torch.float64, seed=5, **sizes)
    modality = "masked text" if name in MASKED else "text"
    return tiny_trainer([technique], directory, model=model, modality=modality).model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "name, small, large",
    [
        ("Llama", {}, WIDE),
        ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1}, WIDE_GROUPED),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, WIDE | {"attention_bias": True, "mlp_bias": True}),
        ("Qwen", GROUPED | {"head_dim": 8}, WIDE_GROUPED | {"head_dim": 8}),
        ("GPT-2", {}, WIDE),
        ("GPT-2", {"n_inner": 40}, WIDE | {"n_inner": 48}),
        ("BERT", {}, WIDE),
        ("RoBERTa", {}, WIDE),
    ],
)
def test_the_function_is_that_of_the_checkpoint(name, small, large, tied, tmp_path):
    deeper = {} if name in MASKED else {"num_hidden_layers": 6}
    tie = {"tie_word_embeddings": tied}
    donor = used(tiny(name, torch.float64, **(small | tie)))
    technique = ExpandFrom()
    model = expanded(technique, name, donor, tmp_path, **(large | deeper | tie))
    assert (model.config.hidden_size, model.num_parameters() > 5 * donor.num_parameters()) == (48, True)
    difference = (logits(name, model) - logits(name, donor)).abs().max()
    assert difference < 1e-9 and technique.report()["preserving"]


@pytest.mark.parametrize("depth", ["stacked", "interleaved", "on_top", "middle"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_every_depth_keeps_the_function(name, depth, tmp_path):
    donor = used(tiny(name, torch.float64))
    model = expanded(ExpandFrom(depth=depth), name, donor, tmp_path, **WIDE, num_hidden_layers=7)
    assert (logits(name, model) - logits(name, donor)).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name, sizes, reason",
    [
        ("Llama", {"hidden_size": 24, "num_attention_heads": 3}, "the width, 24, is no multiple of 16"),
        ("BERT", {"num_hidden_layers": 6}, "norms follow the additions"),
    ],
)
def test_another_function_is_said_in_a_warning(name, sizes, reason, tmp_path, caplog):
    """It is not that of the checkpoint, yet nearer to it than a fresh model is."""
    donor, technique = used(tiny(name, torch.float64)), ExpandFrom()
    fresh = tiny(name, torch.float64, seed=5, **sizes)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    model = expanded(technique, name, donor, tmp_path, **sizes)
    logger.removeHandler(caplog.handler)
    assert reason in caplog.text and not technique.report()["preserving"]
    before = logits(name, donor)
    assert 1e-6 < (logits(name, model) - before).norm() < (logits(name, fresh) - before).norm()


def test_shares_of_copies_sum_to_the_whole():
    """The oracle adds up, copy by copy."""
    values, sources = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 0, 3])
    values = values[:, :4][:, sources]
    shares = shared_out(values, 1, sources, 0.5, torch.Generator().manual_seed(0))
    for row in range(3):
        for unit in range(4):
            places = [j for j in range(7) if sources[j] == unit]
            assert sum(shares[row, j] for j in places) == pytest.approx(float(values[row, places[0]]))
            assert len({float(shares[row, j]) for j in places}) == len(places)


@pytest.mark.parametrize("noise, alike", [(0.0, True), (0.1, False)])
def test_copies_part_only_where_their_shares_differ(noise, alike, tmp_path):
    """Under Adam, units whose shares are equal never part; one MLP of the model shows it."""
    donor = tiny("Llama", torch.float64)
    trainer_model = expanded(ExpandFrom(noise=noise), "Llama", donor, tmp_path, **WIDE)
    trainer = tiny_trainer([], tmp_path, model=trainer_model, dropout=0.0, max_steps=3)
    trainer.train()
    gate = trainer.model.model.layers[1].mlp.gate_proj.weight.detach()
    first, second = gate[:16], gate[32:48]  # copies of the same units
    outputs = trainer.model.model.layers[1].self_attn.o_proj.weight.detach()
    spread = max(float((first - second).abs().max()), float((outputs[:16] - outputs[16:32]).abs().max()))
    assert spread < 1e-9 if alike else spread > 1e-4


def test_a_new_head_keeps_its_own_values(tmp_path):
    """From a language model to a classifier."""
    from transformers import BertForSequenceClassification

    donor = used(tiny("BERT"))
    donor.save_pretrained(tmp_path / "small")
    config = tiny("BERT", **WIDE).config
    config.num_labels = 3
    model = BertForSequenceClassification(config)
    head = model.classifier.weight.clone()
    technique = ExpandFrom(checkpoint=str(tmp_path / "small"))
    trainer = tiny_trainer([technique], tmp_path, model=model, modality="masked text")
    assert torch.equal(trainer.model.classifier.weight, head)
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(
        trainer.model.bert.get_parameter(words), donor.bert.get_parameter(words)[:, torch.arange(48) % 16]
    )


def test_the_same_values_for_the_same_seed_and_no_global_draw(tmp_path):
    donor = used(tiny("Llama", torch.float64))
    first = expanded(ExpandFrom(), "Llama", donor, tmp_path, **WIDE).state_dict()
    torch.randn(3)
    second = expanded(ExpandFrom(), "Llama", donor, tmp_path, **WIDE).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


REFUSED = {
    "nothing": ({}, {"checkpoint": None}, "checkpoint is None. Name the folder"),
    "no model": ({}, {"checkpoint": "no/where"}, "'no/where' cannot be loaded"),
    "no function": ({}, {"checkpoint": "hf_accel.testing:nothing"}, "returns no model"),
    "smaller": ({"hidden_size": 8, "num_attention_heads": 1}, {}, "its width is 8, and the check.* 16.* ShrinkFrom"),
    "shallower": ({"num_hidden_layers": 3}, {}, "its number of blocks is 3, and the checkpoint's 4.* ShrinkFrom"),
    "size of heads": ({"hidden_size": 32}, {}, "heads have 16 elements, and the checkpoint's have 8. Keep"),
    "queries": (WIDE | {"num_key_value_heads": 2}, {}, "6 heads share 2 keys and values, .* 2 share 2. Keep the ratio"),
    "vocabulary": (WIDE | {"vocab_size": VOCABULARY + 1}, {}, "vocab_size is 49, and the checkpoint has 48"),
    "too deep": ({"num_hidden_layers": 9}, {"depth": "middle"}, "4 blocks repeat at most once"),
}


@pytest.mark.parametrize("sizes, fields, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_expanded_is_refused(sizes, fields, words, tmp_path):
    tiny("Llama").save_pretrained(tmp_path / "small")
    technique = ExpandFrom(**({"checkpoint": str(tmp_path / "small")} | fields))
    with pytest.raises(ValueError, match=rf"^ExpandFrom\(.*\): (?!ExpandFrom).*{words}"):
        tiny_trainer([technique], tmp_path, model=tiny("Llama", **sizes))


@pytest.mark.parametrize("name", ["ModernBERT", "T5"])
def test_other_families_are_refused_by_name(name, tmp_path):
    technique = ExpandFrom("hf_accel.testing:tiny_smaller")
    with pytest.raises(ValueError, match=rf"{type(tiny(name)).__name__}: the axes .* are known for llama, .* only"):
        tiny_trainer([technique], tmp_path, model=tiny(name))


def test_a_model_of_another_family_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="its model_type is 'llama', and the model has 'gpt2'"):
        tiny_trainer([ExpandFrom(str(tmp_path / "small"))], tmp_path, model=tiny("GPT-2", **WIDE))
