import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LevitConfig,
    LevitForImageClassification,
)

from hf_accel.optim.learning_rate.layerwise_decay import LayerwiseDecay, distances_from_head
from hf_accel.testing import tiny_convnext, tiny_llama, tiny_trainer, weights_of

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}


def tiny(kind, auto, **fields):
    fields = {**SMALL, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2} | fields
    with torch.random.fork_rng(devices=[]):
        return auto.from_config(AutoConfig.for_model(kind, **fields))


T5 = {"d_model": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
BART = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
VIT = {"image_size": 8, "patch_size": 4, "num_labels": 3}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}

# The blocks of each stack by a pattern of their names with their number, and all that counts as embeddings, by hand.
MODELS = [
    (lambda: tiny_llama(), {r"model\.layers\.(\d)\.": 4}, r"model\.embed_tokens\."),
    (lambda: tiny("llama", AutoModelForCausalLM, tie_word_embeddings=True), {r"layers\.(\d)\.": 3}, r"model\.embed_to"),
    (lambda: tiny("bert", AutoModelForSequenceClassification), {r"encoder\.layer\.(\d)\.": 3}, r"bert\.embeddings\."),
    (lambda: tiny("bert", AutoModelForMaskedLM), {r"encoder\.layer\.(\d)\.": 3}, r"bert\.embeddings\."),
    (lambda: tiny("gpt2", AutoModelForCausalLM, **GPT2), {r"transformer\.h\.(\d)\.": 3}, r"transformer\.w[tp]e\."),
    (lambda: tiny("gpt_neox", AutoModelForCausalLM), {r"gpt_neox\.layers\.(\d)\.": 3}, r"gpt_neox\.embed_in\."),
    (lambda: tiny("vit", AutoModelForImageClassification, **VIT), {r"layers?\.(\d)\.": 3}, r"vit\.embeddings\."),
    (
        lambda: tiny("t5", AutoModelForSeq2SeqLM, decoder_start_token_id=0, **T5),
        {r"encoder\.block\.(\d)\.": 3, r"decoder\.block\.(\d)\.": 2},
        r"shared\.",
    ),
    (
        lambda: tiny("bart", AutoModelForSeq2SeqLM, decoder_start_token_id=0, **BART, **HEADS),
        {r"encoder\.layers\.(\d)\.": 3, r"decoder\.layers\.(\d)\.": 2},
        r"model\.(shared|(en|de)coder\.(embed_positions|layernorm_embedding))\.",
    ),
]


@pytest.mark.parametrize(("build", "stacks", "embeddings"), MODELS, ids=[str(i) for i in range(len(MODELS))])
def test_distances_are_those_that_are_counted_by_hand(build, stacks, embeddings):
    model = build()
    distances = distances_from_head(model)
    assert distances.keys() == dict(model.named_parameters()).keys()
    found = set()
    for name, distance in distances.items():
        expected = 0
        for pattern, length in stacks.items():
            if block := re.search(pattern, name):
                expected = length - int(block[1])
                found.add((pattern, int(block[1])))
        if re.match(embeddings, name):
            expected = max(stacks.values()) + 1
        assert distance == expected, name
    assert found == {(pattern, i) for pattern, length in stacks.items() for i in range(length)}
    assert max(distances.values()) == max(stacks.values()) + 1
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        assert min(distances.values()) == 0
        assert [d for n, d in distances.items() if dict(model.named_parameters())[n] is head.weight] == [0]


def test_lists_in_one_list_are_one_stack():
    for name, distance in distances_from_head(tiny_convnext()).items():
        stage = re.search(r"stages\.(\d)\.", name)
        assert distance == (2 - int(stage[1]) if stage else 3 if "embeddings" in name else 0), name


def test_stages_without_counted_blocks_have_the_distance_of_what_precedes_them():
    with torch.device("meta"):
        model = LevitForImageClassification(LevitConfig(depths=[2, 2, 3]))
    found = distances_from_head(model)
    assert {found[name] for name in found if ".stages.0." in name or ".stages.1." in name} == {max(found.values())}
    last = [found[name] for name in found if ".stages.2." in name]
    assert last == sorted(last, reverse=True) and set(last) == set(range(1, max(found.values())))


def test_the_first_update_is_that_of_the_plain_rate_times_the_factor(tmp_path):
    def update(techniques):
        args = {"max_steps": 1, "optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.0, "learning_rate": 0.1}
        trainer = tiny_trainer(techniques, tmp_path, dropout=0.0, dtype=torch.float64, **args)
        before = weights_of(trainer)
        trainer.train()
        after = weights_of(trainer)
        return {name: after[name] - before[name] for name in before}

    plain, decayed = update([]), update([LayerwiseDecay(decay=0.5)])
    for name in plain:
        block = re.search(r"layers\.(\d)", name)
        distance = 4 - int(block[1]) if block else 5 if "embed_tokens" in name else 0
        assert plain[name].abs().max() > 0
        torch.testing.assert_close(decayed[name], plain[name] * 0.5**distance, rtol=1e-9, atol=1e-14)


def test_a_model_without_blocks_is_refused(tmp_path):
    resnet = AutoModelForImageClassification.from_config(
        AutoConfig.for_model("resnet", embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_channels=3)
    )
    sentence = r"LayerwiseDecay\(decay=0.8\): ResNet.* has no list of the blocks.*Remove the technique for this model"
    with pytest.raises(ValueError, match=sentence):
        tiny_trainer([LayerwiseDecay()], tmp_path, model=resnet).train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_adapters_are_counted_with_their_blocks():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    distances = distances_from_head(peft.get_peft_model(tiny_llama(), config))
    lora = {name: distance for name, distance in distances.items() if "lora_" in name}
    assert len(lora) == 8
    assert all(distance == 4 - int(re.search(r"layers\.(\d)", name)[1]) for name, distance in lora.items())
    assert {distance for name, distance in distances.items() if "modules_to_save" in name} == {0}


def test_8_bit_optimizers_keep_embeddings_in_32_bits_as_trainers_do(tmp_path):
    manager = pytest.importorskip("bitsandbytes").optim.GlobalOptimManager.get_instance()
    trainer = tiny_trainer([LayerwiseDecay()], tmp_path, optim="adamw_bnb_8bit")
    trainer.create_optimizer()
    overrides = [
        (name, options)
        for module, name, options in manager.module_weight_config_triple
        if module is trainer.model.get_input_embeddings()
    ]
    assert overrides == [("weight", {"optim_bits": 32})]
