import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging

from hf_accel import LoRA, Muon
from hf_accel.optim.optimizers import muon as muon_file
from hf_accel.optim.optimizers.muon import MuonAdamW, matrices_in, warmed_up
from hf_accel.testing import tiny_trainer, weights_of

ARGS = SimpleNamespace(learning_rate=1e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, optim="adamw_torch")
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
}  # fmt: skip


def tiny(kind="llama", auto=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, pad_token_id=0, use_cache=False, **SMALL, **fields)).double()


def made(model, technique=None, factor=1.0, deepspeed=False):
    technique = technique or Muon()
    technique.run_ = SimpleNamespace(args=ARGS, is_deepspeed_enabled=deepspeed)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    halves = [n for n in names if "norm" not in n], [n for n in names if "norm" in n]
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in half], "names": half, "lr": 1e-3 * factor, "weight_decay": wd, "group": ""}
        for half, wd in zip(halves, (0.1, 0.0), strict=True)
        if half
    ]
    return technique.optimizer(model, groups)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def orthogonalized(matrix):
    """Keller Jordan's quintic iteration, in float64."""
    x = matrix / matrix.norm()
    x = x.T if len(x) > len(x.T) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(matrix) > len(matrix.T) else x


def test_matrices_follow_newton_schulz_and_the_rest_adamw():
    model = tiny()
    reference, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = made(model, factor=0.5)
    muon = {n for n, _ in model.named_parameters() if "proj" in n}
    assert matrices_in(model).keys() == muon and len(muon) == 14
    rest = [(n, p) for n, p in twin.named_parameters() if n not in muon]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in rest if "norm" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in rest if "norm" in n], "weight_decay": 0.0},
        ],
        lr=5e-4, betas=(0.8, 0.95), eps=1e-7,
    )  # fmt: skip
    momenta, lr = {}, 0.02 * 0.5
    for step in range(3):
        for m in (model, reference, twin):
            gradients(m, step)
        optimizer.step()
        adamw.step()
        for name, weight in reference.named_parameters():
            if name in muon:
                momenta[name] = 0.95 * momenta.get(name, 0) + 0.05 * weight.grad
                update = orthogonalized(0.05 * weight.grad + 0.95 * momenta[name])
                scale = lr * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
                weight.data.mul_(1 - lr * 0.1).sub_(scale * update)
    expected, apart = dict(reference.named_parameters()), dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        if name in muon:
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(weight, apart[name]), name


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_bit_for_bit(way):
    model = tiny().float()
    optimizer = made(model)
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    if way == "state_dict":
        other = copy.deepcopy(model)
        restored = made(other)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        pair = copy.deepcopy((model, optimizer)) if way == "deepcopy" else torch.load(file, weights_only=False)
        other, restored = pair
    for m, o in ((model, optimizer), (other, restored)):
        for step in (2, 3):
            gradients(m, step)
            o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [len(state) for state in optimizer.state.values()]
    assert sorted(set(moments)) == [1, 3] and len(moments) == len(list(model.parameters()))


def test_the_schedule_multiplies_both_rates_and_groups_can_be_added():
    model = tiny()
    optimizer = made(model)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    gradients(model, 0)
    optimizer.step()
    scheduler.step()
    assert {(g["algorithm"], g["lr"]) for g in optimizer.param_groups} == {("muon", 0.01), ("adamw", 5e-4)}
    late = torch.nn.Parameter(torch.eye(3))
    group = next(g for g in optimizer.param_groups if g["algorithm"] == "muon")
    optimizer.add_param_group(group | {"params": [late], "lr": 0.1, "shape": (1, 3, 3)})
    late.grad = torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(late, torch.eye(3))


def test_embeddings_and_heads_are_adamws():
    tied = tiny(tie_word_embeddings=True)
    assert not any("embed" in n or "head" in n for n in matrices_in(tied))
    names = matrices_in(tiny("bert", AutoModelForSequenceClassification))
    assert len(names) == 2 * 6 and not any("classifier" in n or "pooler" in n or "embeddings" in n for n in names)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="does not support DeepSpeed ZeRO because it flattens"):
        made(tiny(), deepspeed=True)
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" not in name)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    group = {"params": [p for _, p in parameters], "names": [n for n, _ in parameters], "lr": 1e-3, "weight_decay": 0}
    technique = Muon()
    technique.run_ = SimpleNamespace(args=ARGS, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no trainable matrix in a block"):
        technique.optimizer(model, [group])


def test_it_reports_its_share():
    model, technique = tiny(), Muon()
    optimizer = made(model, technique)
    matrices = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert technique.report() == {"muon_share": matrices / sum(p.numel() for p in model.parameters())}
    assert isinstance(optimizer, MuonAdamW) and "names" not in optimizer.param_groups[0]


def stepped(model, **fields):
    """The parameters after three steps."""
    optimizer = made(model, Muon(**fields))
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    return dict(model.named_parameters())


def by_hand(matrix, gradients, momentum=0.95, decay=0.1, cautious=False):
    """Muon on one (out, in) matrix."""
    average = torch.zeros_like(matrix)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        update = orthogonalized((1 - momentum) * gradient + momentum * average)
        kept = 1 - 0.02 * decay * ((update * matrix >= 0).to(matrix) if cautious else 1)
        matrix = matrix * kept - 0.02 * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * update
    return matrix


def recorded(model, name):
    seen = []
    for step in range(3):
        gradients(model, step)
        seen.append(dict(model.named_parameters())[name].grad.clone())
    return seen


def test_gpt2_is_trained_as_its_separate_matrices():
    model = tiny("gpt2", n_inner=40).double()
    before = copy.deepcopy(model)
    after = stepped(model)
    for layer, scale_as in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 1), ("mlp.c_proj", 1)):
        name = f"transformer.h.1.{layer}.weight"
        old = dict(before.named_parameters())[name].detach()
        grads = recorded(before, name)
        thirds = [
            by_hand(w.T, [g.T for g in gs]).T
            for w, *gs in zip(old.chunk(scale_as, 1), *(g.chunk(scale_as, 1) for g in grads), strict=True)
        ]
        torch.testing.assert_close(after[name].detach(), torch.cat(thirds, 1), rtol=1e-9, atol=1e-12)


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn((3, 4, 10) if transposed else (3, 10, 4)))
        self.up_proj_bias = nn.Parameter(torch.randn(3, 10))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.Wqkv = nn.Linear(6, 18)
        self.qkv_proj = nn.Linear(6, 12)
        self.query_key_value = nn.Linear(6, 18)
        self.conv = nn.Conv2d(4, 5, 3)
        self.conv1 = nn.Conv1d(4, 5, 3)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.experts = Experts(False)
        self.transposed = Experts(True)
        self.attention = nn.MultiheadAttention(6, 2)
        self.scales = nn.Parameter(torch.randn(2, 3, 4))
        self.table = nn.Parameter(torch.randn(3, 4))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Block()])


def test_each_kind_of_weight_is_trained_as_its_matrices():
    model = Blocks().double()
    before = copy.deepcopy(model)
    after = stepped(model)
    kinds = {
        "Wqkv.weight": lambda w: list(w.chunk(3)),
        "qkv_proj.weight": lambda w: [w],
        "query_key_value.weight": lambda w: [w],
        "conv.weight": lambda w: [w.reshape(5, 36)],
        "conv1.weight": lambda w: [w.reshape(5, 12)],
        "attention.in_proj_weight": lambda w: list(w.chunk(3)),
        "attention.out_proj.weight": lambda w: [w],
        "experts.up_proj": lambda w: list(w),
        "transposed.up_proj": lambda w: [expert.T for expert in w],
    }
    assert matrices_in(model).keys() == {f"blocks.0.{name}" for name in kinds}
    for name, apart in kinds.items():
        name = f"blocks.0.{name}"
        old, grads = dict(before.named_parameters())[name].detach(), recorded(before, name)
        parts = [by_hand(w, gs) for w, *gs in zip(apart(old), *map(apart, grads), strict=True)]
        for ours, theirs in zip(apart(after[name].detach()), parts, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("modality", ["image", "speech"])
def test_models_without_input_embeddings_are_trained(modality, tmp_path):
    trainer = tiny_trainer([Muon()], tmp_path, modality=modality, max_steps=2)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    names = matrices_in(trainer.model)
    assert names and all(not torch.equal(before[name], after[name]) for name in names)
    assert trainer.receipt.techniques[0]["report"]["muon_share"] > 0


def algorithms(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group["algorithm"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["mamba", "jamba", "falcon_mamba"])
def test_decay_rates_of_state_space_models_are_no_matrices(kind):
    fields = {"state_size": 4, "time_step_rank": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}
    fields |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 2} if kind == "jamba" else {}
    model = tiny(kind, **fields).float()
    found = algorithms(model, made(model))
    tables = {n: a for n, a in found.items() if n.endswith("A_log")}
    assert tables and set(tables.values()) == {"adamw"}
    assert {a for n, a in found.items() if n.endswith("in_proj.weight")} == {"muon"}


def test_position_bias_tables_are_no_matrices():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    config = AutoConfig.for_model("swin", **sizes)
    model = AutoModelForImageClassification.from_config(config)
    found = algorithms(model, made(model))
    assert {a for n, a in found.items() if "bias_table" in n} == {"adamw"}
    assert {a for n, a in found.items() if n.endswith("query.weight") or "fc1.weight" in n} == {"muon"}


def test_experts_of_llama_4_are_stored_in_times_out():
    fields = {"num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 8, "intermediate_size_mlp": 24}
    model = tiny("llama4_text", **fields)
    before = copy.deepcopy(model)
    after = stepped(model)
    for name, shape in (("gate_up_proj", (16, 80)), ("down_proj", (40, 16))):
        name = f"model.layers.1.feed_forward.experts.{name}"
        old, grads = dict(before.named_parameters())[name].detach(), recorded(before, name)
        assert old.shape == (3, *shape)
        for i in range(3):
            expected = by_hand(old[i].T, [g[i].T for g in grads]).T
            torch.testing.assert_close(after[name][i].detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (4, 64), (64, 4)])
def test_an_element_moves_as_far_as_under_adamw_with_match_rms(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, dtype=torch.float64)
    options = {"algorithm": "muon", "weight_decay": 0.0, "cautious": False, "momentum": 0.95, "transposed": False}
    group = options | {"params": [weight], "lr": 1e-3, "scale": "match_rms", "shape": (1, *shape)}
    expected = -1e-3 * 0.2 * math.sqrt(64) * orthogonalized(weight.grad)
    MuonAdamW([group]).step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
    # 0.2 is the usual root mean square of AdamW's updates; the iteration leaves singular values within 0.68 and 1.21.
    assert 0.2 * 0.68 <= weight.detach().square().mean().sqrt() / 1e-3 <= 0.2 * 1.21


def test_match_rms_takes_the_trainers_rate():
    model = tiny()
    rates = {(g["algorithm"], g["lr"]) for g in made(model, Muon(scale="match_rms")).param_groups}
    assert rates == {("muon", 1e-3), ("adamw", 1e-3)}
    model = tiny()
    groups = made(model, Muon(lr=3e-4, scale="match_rms")).param_groups
    assert [g["lr"] for g in groups if g["algorithm"] == "muon"] == pytest.approx([3e-4] * 3)


def test_adapters_at_the_spectral_scale_are_warned_of(tmp_path, caplog):
    logging.enable_propagation()
    try:
        tiny_trainer([LoRA(rank=4), Muon(scale="match_rms")], tmp_path).create_optimizer()
        assert "match_rms' to train adapters" not in caplog.text
        trainer = tiny_trainer([LoRA(rank=4), Muon()], tmp_path, max_steps=1)
        trainer.train()
        assert "Set scale='match_rms' to train adapters at AdamW's rate." in caplog.text
    finally:
        logging.disable_propagation()


def test_a_learning_rate_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not support learning_rate=0 because it is the rate of embeddings"):
        tiny_trainer([Muon()], tmp_path, learning_rate=0.0).train()


def test_cautious_decay_passes_over_what_grows():
    model = tiny()
    before = copy.deepcopy(model)
    after = stepped(model, cautious=True)
    name = "model.layers.0.mlp.up_proj.weight"
    old, grads = dict(before.named_parameters())[name].detach(), recorded(before, name)
    expected = by_hand(old, grads, cautious=True)
    torch.testing.assert_close(after[name].detach(), expected, rtol=1e-9, atol=1e-12)
    assert (expected - by_hand(old, grads)).abs().max() > 1e-5


def test_many_matrices_are_iterated_a_part_at_a_time(monkeypatch):
    whole = stepped(tiny())
    monkeypatch.setattr(muon_file, "BATCH", 600)
    for name, parameter in stepped(tiny()).items():
        torch.testing.assert_close(parameter, whole[name], rtol=1e-12, atol=1e-14)


def test_momentum_rises_with_progress(tmp_path):
    seen = []

    class Watched(Muon):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append({g["momentum"] for g in optimizer.param_groups if g["algorithm"] == "muon"})

    tiny_trainer([Watched(momentum=0.95, momentum_warmup=0.5)], tmp_path).train()
    expected = [0.85 + 0.1 * min(step / 12, 1) for step in range(24)]
    assert [momentum for (momentum,) in seen] == pytest.approx(expected)
    assert warmed_up(0.8, 0.0) == warmed_up(0.8, 0.7) == 0.8


def test_it_uses_the_fused_adamw_where_trainer_does():
    model = tiny().float()
    technique = Muon()
    args = SimpleNamespace(**vars(ARGS) | {"optim": "adamw_torch_fused"})
    technique.run_ = SimpleNamespace(args=args, is_deepspeed_enabled=False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    group = {"params": list(parameters), "names": list(names), "lr": 1e-3, "weight_decay": 0.1, "group": ""}
    optimizer = technique.optimizer(model, [group])
    rest = [copy.deepcopy(p) for n, p in model.named_parameters() if "proj" not in n]
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1, fused=True)
    gradients(model, 0)
    for twin, p in zip(rest, (p for n, p in model.named_parameters() if "proj" not in n), strict=True):
        twin.grad = p.grad.clone()
    optimizer.step()
    adamw.step()
    for twin, p in zip(rest, (p for n, p in model.named_parameters() if "proj" not in n), strict=True):
        assert torch.equal(twin, p)


def test_fine_tuning_all_of_a_checkpoint_is_warned_of(tmp_path, caplog):
    tiny().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        made(tiny())
        assert not caplog.messages
        made(loaded)
        assert "looks pre-trained" in caplog.text
        caplog.clear()
        frozen = AutoModelForCausalLM.from_pretrained(tmp_path)
        for name, parameter in frozen.named_parameters():
            parameter.requires_grad_("layers.1" in name)
        made(frozen)
        assert not caplog.messages
    finally:
        logging.disable_propagation()
