import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
)

from hf_accel import attach
from hf_accel.model.compression.lora import LoRA, add_adapters, new_heads
from hf_accel.testing import (
    check_evaluates_what_it_returns,
    check_resumes_bit_exactly,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
VIT = {"image_size": 8, "patch_size": 4}
MODERN = {"cls_token_id": 1, "sep_token_id": 2}
LAYERS_OF_LLAMA = 7
ARCHITECTURES = [
    ("llama", AutoModelForCausalLM, {}, 2 * LAYERS_OF_LLAMA),
    ("qwen3", AutoModelForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}, 2 * LAYERS_OF_LLAMA),
    ("llama", AutoModelForSequenceClassification, {}, 2 * LAYERS_OF_LLAMA),
    ("gpt2", AutoModelForCausalLM, {"n_embd": 16, "n_layer": 2, "n_head": 2}, 2 * 4),
    ("bert", AutoModelForMaskedLM, {}, 2 * 6 + 1),  # one before the projection to the vocabulary
    ("bert", AutoModelForSequenceClassification, {}, 2 * 6 + 1),  # the pooler
    ("roberta", AutoModelForSequenceClassification, {}, 2 * 6),
    ("modernbert", AutoModelForSequenceClassification, MODERN, 2 * 4),
    ("t5", AutoModelForSeq2SeqLM, T5, 2 * 6 + 2 * 10),
    ("vit", AutoModelForImageClassification, VIT, 2 * 6),
]


def tiny(kind, auto, fields):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **(SMALL | fields)))


def prepared(technique, model):
    technique.run_ = SimpleNamespace(args=SimpleNamespace(seed=3, learning_rate=1e-3))
    return technique.prepare_model(model)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_training_is_that_of_plain_peft(variant, tmp_path):
    options = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}[variant]
    ours = tiny_trainer([LoRA(rank=4, variant=variant, lr_factor=10)], tmp_path, learning_rate=1e-3)
    ours.train()
    model = tiny_llama()
    torch.manual_seed(7)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", **options))
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, model=model, learning_rate=1e-2)
    plain.train()
    assert losses_of(ours) == losses_of(plain)
    assert largest_difference(weights_of(ours), weights_of(plain)) == 0.0


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_merged_and_adapted_models_are_the_trained_one(variant, tmp_path):
    # peft makes PiSSA in float32 only.
    dtype, close = (torch.float32, 1e-4) if variant == "pissa" else (torch.float64, 1e-9)
    tiny_llama(dtype=dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    trainer = tiny_trainer([LoRA(rank=4, variant=variant)], tmp_path, model=base, max_steps=3)
    trainer.train()

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(3, 23)[None]).logits

    def loaded(folder):
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype)

    trained = logits(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    assert sorted(path.suffix for path in (tmp_path / "adapter").glob("adapter_*")) == [".json", ".safetensors"]
    assert (logits(loaded("base")) - trained).abs().max() > 1e-2
    models = {"adapted": PeftModel.from_pretrained(loaded("base"), tmp_path / "adapter")}
    if variant != "dora":  # transformers 5.23 looks for its lengths under another name
        models["adapted without peft's class"] = loaded("adapter")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    models["merged"] = loaded("merged")
    for model in models.values():
        torch.testing.assert_close(logits(model), trained, rtol=close, atol=close)


@pytest.mark.parametrize(("kind", "auto", "fields", "layers"), ARCHITECTURES)
def test_all_layers_but_the_head_are_adapted(kind, auto, fields, layers):
    model = tiny(kind, auto, fields)
    heads = {name.split(".")[0] for name in ("classifier", "score", "head") if hasattr(model, name)}
    assert set(new_heads(model)) == (heads if auto is not AutoModelForMaskedLM else set())
    technique = LoRA(rank=4)
    adapted = prepared(technique, model)
    assert technique.layers_ == layers
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len([name for name in trained if ".lora_A." in name]) == layers
    whole = {name for name in trained if ".lora_" not in name}
    assert {name.split(".")[2] for name in whole} == heads and all(".modules_to_save." in name for name in whole)


def test_rates_are_those_of_peft(tmp_path):
    trainer = tiny_trainer([LoRA(rank=4, lr_factor=5, lr_ratio=16)], tmp_path, learning_rate=1e-3)
    trainer.create_optimizer()
    theirs = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=16)
    rates = [
        {id(p): group["lr"] for group in o.param_groups for p in group["params"]} for o in (trainer.optimizer, theirs)
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0].values())) == 2


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_resume_and_are_saved(variant, tmp_path):
    check_resumes_bit_exactly(LoRA(rank=4, variant=variant), tmp_path)
    check_evaluates_what_it_returns(LoRA(rank=4, variant=variant), tmp_path)


def test_adapters_are_made_from_the_seed_alone():
    state = torch.random.get_rng_state()
    models = [add_adapters(tiny_llama(), rank=4, alpha=8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (model.state_dict() for model in models)
    assert largest_difference(a, b) == 0.0 < largest_difference(a, c)


def quantized_llama(kind, folder):
    """`tiny_llama` without dropout in 8 bits (torchao) or 4 (bitsandbytes)."""
    tiny_llama(dropout=0.0).save_pretrained(folder)
    if kind == "int8":
        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes", reason="weights of 4 bits need it (pip install bitsandbytes)")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def dequantized(weight):
    """The values that a quantized matrix stands for."""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if type(weight.data) is not torch.Tensor else weight.data


def adapters_of(trainer):
    return {name: value for name, value in weights_of(trainer).items() if ".lora_" in name}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_model_trains_as_one_of_the_values_that_its_weights_stand_for(kind, tmp_path):
    quantized = quantized_llama(kind, tmp_path / "base")
    before = {name: dequantized(p).float().clone() for name, p in quantized.named_parameters()}
    whole = tiny_llama(dropout=0.0)
    changed = {name for name, p in whole.named_parameters() if (p - before[name]).abs().max() > 1e-4}
    assert len(changed) == 4 * LAYERS_OF_LLAMA, "all linear layers but the head"
    whole.load_state_dict(before)
    trainers = [
        tiny_trainer([LoRA(rank=4)], tmp_path, model=model, learning_rate=1e-3, max_steps=8)
        for model in (quantized, whole)
    ]
    for trainer in trainers:
        trainer.train()
    assert losses_of(trainers[0]) == pytest.approx(losses_of(trainers[1]), rel=1e-3)
    adapters, expected = map(adapters_of, trainers)
    assert adapters.keys() == expected.keys() and len(adapters) == 2 * 4 * LAYERS_OF_LLAMA
    for name, values in expected.items():
        assert (adapters[name] - values).norm() < 0.01 * values.norm(), name  # B was zero
    assert trainers[0].techniques[0].report() == trainers[1].techniques[0].report()
    trained = {name for name, p in trainers[0].model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    base = trainers[0].model.get_base_model()
    after = {
        name.replace(".base_layer", ""): dequantized(p) for name, p in base.named_parameters() if ".lora_" not in name
    }
    assert after.keys() == before.keys() and all(torch.equal(after[name].float(), before[name]) for name in before)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_models_resume_bit_exactly_under_activation_checkpointing(kind, tmp_path):
    options = {"learning_rate": 1e-3, "max_steps": 6, "activation_checkpointing": True}
    options["activation_checkpointing_kwargs"] = {"use_reentrant": True}  # needs gradients of what goes into a layer

    def trainer(folder, **more):
        model = quantized_llama(kind, tmp_path / "base")
        return tiny_trainer([LoRA(rank=4)], tmp_path / folder, model=model, **options, **more)

    straight = trainer("straight", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1)
    straight.train()
    assert not list((tmp_path / "straight" / "checkpoint-4").glob("model*"))
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(adapters_of(resumed), adapters_of(straight)) == 0.0


def test_gradients_after_an_evaluation_are_those_before_it(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="weights of 4 bits need it (pip install bitsandbytes)")
    fields = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs 64 weights together
    tiny("llama", AutoModelForCausalLM, fields).save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    gradients = []
    for evaluations in ("none", "before adapters", "after them"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
        with torch.no_grad():
            if evaluations == "before adapters":
                model.eval()(input_ids=ids)
            adapted = add_adapters(model, rank=4, alpha=8)
            if evaluations == "after them":
                adapted.eval()(input_ids=ids)
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if ".lora_B." in name})
    assert largest_difference(gradients[2], gradients[0]) == 0.0
    for name, expected in gradients[0].items():  # bitsandbytes rounds the scales to bfloat16 when it packs
        assert (gradients[1][name] - expected).norm() < 0.02 * expected.norm(), name


def test_what_is_not_quantized_is_float32(tmp_path):
    pytest.importorskip("bitsandbytes", reason="weights of 4 bits need it (pip install bitsandbytes)")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    adapted = prepared(LoRA(rank=4), model)
    kinds = {name: p.dtype for name, p in adapted.named_parameters()}
    packed = {name for name, dtype in kinds.items() if dtype == torch.uint8}
    assert len(packed) == 4 * LAYERS_OF_LLAMA and all(".base_layer." in name for name in packed)
    assert set(kinds.values()) == {torch.float32, torch.uint8}


def test_a_quantized_model_trains_with_adapters_that_are_there_first(tmp_path):
    model = add_adapters(quantized_llama("int8", tmp_path / "base"), rank=4, alpha=8)
    trainer = tiny_trainer([], tmp_path, model=model, learning_rate=1e-2)
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in adapters.items()}
    trainer.train()
    assert len(adapters) == 2 * 4 * LAYERS_OF_LLAMA and all(".lora_" in name for name in adapters)
    assert not any(torch.equal(before[name], p) for name, p in adapters.items())


def test_quantized_models_that_cannot_be_trained_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has quantized weights.*no adapters.*Add adapters"):
        tiny_trainer([], tmp_path, model=quantized_llama("int8", tmp_path / "base"))
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, model=add_adapters(tiny_llama(), rank=4, alpha=8))
    with pytest.raises(ValueError, match=r"has adapters already\. Pass the pretrained model itself\.$"):
        attach(plain, [LoRA(rank=4)])
    adapted = add_adapters(quantized_llama("int8", tmp_path / "base"), rank=4, alpha=8)
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, model=adapted)
    with pytest.raises(ValueError, match=r"has adapters already\. Pass the pretrained model itself to AccelTrainer"):
        attach(plain, [LoRA(rank=4)])
    with pytest.raises(ValueError, match=r"LoRA\(.*variant='pissa'.*no singular values\. Set variant"):
        tiny_trainer([LoRA(rank=4, variant="pissa")], tmp_path, model=quantized_llama("int8", tmp_path / "base"))
    packed = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=packed)
    with pytest.raises(
        ValueError, match=r"torchao weights of this kind cannot be trained\. Load them with bitsandbytes"
    ):
        tiny_trainer([LoRA(rank=4)], tmp_path, model=model)


def test_what_it_does_to_the_rate_is_said(caplog):
    prepared(LoRA(rank=4), tiny_llama())
    assert "the peak learning rate is 0.01, 10 times learning_rate=0.001" in caplog.text
    assert "saves adapters without it" in caplog.text


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"LoRA\(rank=17.*rank is above.*\(16 x 16\).*Set rank=16 or less"):
        prepared(LoRA(rank=17), tiny_llama())
    with pytest.raises(ValueError, match=r"LoRA\(.*target='nothing'.*not found"):
        prepared(LoRA(rank=4, target="nothing"), tiny_llama())
    with pytest.raises(ValueError, match=r"has adapters already\. Pass the pretrained model itself"):
        prepared(LoRA(rank=4), add_adapters(tiny_llama(), rank=4, alpha=8))
    resnet = tiny("resnet", AutoModelForImageClassification, {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]})
    with pytest.raises(
        ValueError, match=r"LoRA\(.*needs a linear layer beside the head; ResNet.* has none\. Remove LoRA"
    ):
        prepared(LoRA(rank=4), resnet)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"LoRA\(.*peft is not installed.*pip install 'hf-accel\[peft\]'"):
        prepared(LoRA(rank=4), tiny_llama())


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "made here"])
def test_a_script_that_saves_its_own_model_gets_one_that_loads(loaded, tmp_path):
    model = tiny_llama()
    if loaded:
        model.save_pretrained(tmp_path / "base")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer, model=model, max_steps=3)
    attach(trainer, [LoRA(rank=4, lr_factor=1.0)])
    trainer.train()
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists() == loaded
    ids = torch.arange(3, 15)[None]
    expected = trainer.model.eval()(input_ids=ids).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, tiny_llama().eval()(input_ids=ids).logits)
    trainer.model.merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
