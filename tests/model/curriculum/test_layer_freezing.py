import functools
import math

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_accel import LoRA
from hf_accel.meters.flops import FlopMeter
from hf_accel.model.curriculum.layer_freezing import (
    LayerFreezing,
    frozen_depth,
)
from hf_accel.surgery.freezing import find_blocks, has_tied_head
from hf_accel.testing import tiny_trainer

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}


def tiny(kind="llama", auto=AutoModelForCausalLM, layers=4, **fields):
    torch.manual_seed(0)
    fields = {**SMALL, "num_hidden_layers": layers, "bos_token_id": 1, "eos_token_id": 2} | fields
    return auto.from_config(AutoConfig.for_model(kind, use_cache=False, **fields))


def data(num=32):
    ids = torch.randint(3, 64, (num, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Recorder(TrainerCallback):
    """Weights before every step and gradients of every step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights, self.names = [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights.append({k: v.detach().clone() for k, v in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.names.append({k for k, v in model.named_parameters() if v.grad is not None})


def train(tmp_path, technique, model, **fields):
    recorder = Recorder()
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=8, use_cpu=True, report_to=[], weight_decay=0.1,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, optim="adamw_torch", **fields,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[technique, recorder])
    trainer.train()
    recorder.weights.append({k: v.detach().clone() for k, v in model.named_parameters()})
    return recorder


@pytest.mark.parametrize("num_blocks", [1, 5, 12])
@pytest.mark.parametrize(("start", "max_fraction"), [(0.0, 1.0), (0.5, 0.5), (0.3, 0.29)])
def test_depth_is_its_equation(num_blocks, start, max_fraction):
    most = math.floor(num_blocks * max_fraction)
    times = [start + (1 - start) * i / most for i in range(most)]
    for progress in np.random.default_rng(0).random(100):
        expected = sum(time <= progress for time in times)
        assert frozen_depth(progress, num_blocks, start=start, max_fraction=max_fraction) == expected
    assert frozen_depth(start, num_blocks, start=start, max_fraction=max_fraction) == min(most, 1)
    assert frozen_depth(1.0, num_blocks, start=start, max_fraction=max_fraction) == most


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_blocks_and_what_is_below_them_stay(tmp_path, tied, checkpointing):
    technique, model = LayerFreezing(start=0.25, max_fraction=0.75), tiny(tie_word_embeddings=tied)
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    user = {k: p.requires_grad for k, p in model.named_parameters()}
    for _ in range(2):
        recorder = train(tmp_path, technique, model, activation_checkpointing=checkpointing)
        for step in range(8):
            depth = sum(step / 8 >= time for time in (0.25, 0.5, 0.75))
            before, after = recorder.weights[step : step + 2]
            for name in before:
                block = int(name.split("layers.")[1][0]) if "layers." in name else None
                below = depth > 0 and "embed_tokens" in name and not tied
                frozen = below or (block is not None and block < depth) or not user[name]
                assert torch.equal(before[name], after[name]) == frozen, (step, name)
                assert (name in recorder.names[step]) != frozen
        report = technique.report()
        assert report["frozen_blocks"] == 3 and report["frozen_share"] == pytest.approx((1 + 1 + 2 + 2 + 3 + 3) / 32)
        assert ("tied" in report["embeddings"]) == tied and technique.took_effect(report)
        assert user == {k: p.requires_grad for k, p in model.named_parameters()}
        assert not any(m._forward_pre_hooks for m in model.modules())


ENCODER = ("bert", AutoModelForMaskedLM, {})
T5 = {
    "d_model": 16,
    "num_layers": 4,
    "num_heads": 2,
    "tie_word_embeddings": False,
    "d_kv": 8,
    "d_ff": 32,
    "decoder_start_token_id": 0,
}
DECODERS = [
    ("gpt2", AutoModelForCausalLM, {"n_embd": 16, "n_layer": 4, "n_head": 2, "tie_word_embeddings": False}),
    ("opt", AutoModelForCausalLM, {"ffn_dim": 32, "word_embed_proj_dim": 16, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "auto", "fields"), [ENCODER, ("t5", AutoModelForSeq2SeqLM, T5), *DECODERS])
def test_blocks_above_get_the_same_gradient_for_fewer_flops(kind, auto, fields, tmp_path):
    model = tiny(kind, auto, **fields).double().eval()
    batch = {k: torch.stack([row[k] for row in data(4)]) for k in ("input_ids", "labels")}

    def backward():
        model.zero_grad()
        loss = model(**batch).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    flops, grads = backward()
    technique = LayerFreezing()
    args = TrainingArguments(tmp_path, use_cpu=True)
    technique.on_train_begin(args, None, None, model=model)
    saved = []
    for depth in (1, 2, 3):
        technique._freeze(depth)
        fewer, frozen_grads = backward()
        saved.append(flops - fewer)
        assert all(p.grad is None for block in find_blocks(model)[:depth] for p in block.parameters())
        above = [k for k in frozen_grads if not any(word in k for word in ("shared", "embed", "wte"))]
        assert above
        for name in above:
            torch.testing.assert_close(frozen_grads[name], grads[name], rtol=1e-9, atol=1e-12)
    per_block = saved[1] - saved[0]
    assert saved[0] >= per_block > 0 and saved[2] - saved[1] == per_block
    technique._freeze(0)
    assert backward()[0] == flops


def test_what_it_cannot_do_is_refused(tmp_path):
    resnet = AutoModelForImageClassification.from_config(
        AutoConfig.for_model("resnet", embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_channels=3)
    )
    args = TrainingArguments(tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match=r"LayerFreezing\(.*ResNet.*no list of the blocks.*Remove the technique"):
        LayerFreezing().on_train_begin(args, None, None, model=resnet)


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("gpt2", True), ("llama", False), ("bert", True), ("kyutai_speech_to_text", False), ("pp_formulanet", False)],
)
def test_a_tied_head_is_found_whatever_the_input_embeddings_are(kind, tied):
    name = {
        "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM",
        "kyutai_speech_to_text": "KyutaiSpeechToTextForConditionalGeneration",
        "pp_formulanet": "PPFormulaNetForConditionalGeneration",
    }[kind]  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, name)(AutoConfig.for_model(kind))
    assert has_tied_head(model) == tied


@pytest.mark.parametrize("how", ["the arguments", "the model"])
def test_reentrant_checkpointing_is_refused_wherever_it_was_turned_on(how, tmp_path):
    model = tiny()
    fields = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    if how == "the model":
        model.activation_checkpointing_enable({"use_reentrant": True})
        fields = {}
    with pytest.raises(ValueError, match="does not support reentrant checkpointing .* Set use_reentrant=False"):
        train(tmp_path, LayerFreezing(), model, **fields)
    model = tiny()
    model.activation_checkpointing_enable({"use_reentrant": False})
    recorder = train(tmp_path, LayerFreezing(start=0.0), model)
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(recorder.weights[-2][name], recorder.weights[-1][name])


def test_a_run_in_which_nothing_would_be_left_to_train_is_refused(tmp_path):
    adapters = [LoRA(rank=4), LayerFreezing(max_fraction=1.0)]
    trainer = tiny_trainer(adapters, tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="nothing that is trained lies above the first 4 of 4 blocks. Lower max_frac"):
        trainer.train()
    assert trainer.state.global_step == 0
    tiny_trainer([LoRA(rank=4), LayerFreezing(max_fraction=0.75)], tmp_path, max_steps=4).train()
    model = tiny()
    for name, parameter in model.named_parameters():  # only what lies below the frozen blocks
        parameter.requires_grad_("layers.0" in name or "embed" in name)
    with pytest.raises(ValueError, match="nothing that is trained lies above the first 1 of 4 blocks"):
        train(tmp_path, LayerFreezing(max_fraction=0.25), model)
    # Encoder blocks still learn through the decoder's attention.
    train(tmp_path, LayerFreezing(start=0.0, max_fraction=1.0), tiny("t5", AutoModelForSeq2SeqLM, **T5))


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_flops_are_those_of_the_blocks_that_are_trained(depth, tmp_path):
    """Of products of matrices with T tokens in B rows of L, width h, inner width f and V words, a block computes
    2 T (4 h^2 + 3 h f) + 4 B L^2 h forward and twice that backward, the head 2 T h V and twice that."""
    model = tiny(attn_implementation="eager")
    batch = {k: torch.stack([row[k] for row in data(4)]) for k in ("input_ids", "labels")}
    technique = LayerFreezing()
    technique.on_train_begin(TrainingArguments(tmp_path, use_cpu=True), None, None, model=model)
    technique._freeze(depth)
    tokens, h, f, v = 4 * 8, 16, 32, 64
    block = 2 * tokens * (4 * h * h + 3 * h * f) + 4 * 4 * 8 * 8 * h
    head = 2 * tokens * h * v
    angles = functools.partial(model.model.rotary_emb, torch.zeros(1, 8, h), torch.arange(8)[None])
    _, angles = FlopMeter().measure(model, batch, angles)
    flops = FlopMeter().measure(model, batch, lambda: model(**batch).loss.backward())[1]
    assert flops.executed == 4 * block + head + angles.executed + 2 * (4 - depth) * block + 2 * head
