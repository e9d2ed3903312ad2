import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_accel.optim.optimizers.muon import Muon, MuonAdamW, matrices_in

ARGS = SimpleNamespace(learning_rate=1e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, optim="adamw_torch")
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
}  # fmt: skip


def tiny(kind="llama", auto=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, pad_token_id=0, use_cache=False, **SMALL, **fields)).double()


def made(model, technique=None, factor=1.0, deepspeed=False):
    technique = technique or Muon()
    technique.host_ = SimpleNamespace(args=ARGS, is_deepspeed_enabled=deepspeed)
    names = [n for n, p in model.named_parameters()]
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


def orthogonalised(matrix):
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
                update = orthogonalised(0.05 * weight.grad + 0.95 * momenta[name])
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
    with pytest.raises(ValueError, match="under DeepSpeed ZeRO"):
        made(tiny(), deepspeed=True)
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" not in name)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    group = {"params": [p for _, p in parameters], "names": [n for n, _ in parameters], "lr": 1e-3, "weight_decay": 0}
    technique = Muon()
    technique.host_ = SimpleNamespace(args=ARGS, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no trainable matrix in a block"):
        technique.optimizer(model, [group])


def test_it_reports_its_share():
    model, technique = tiny(), Muon()
    optimizer = made(model, technique)
    matrices = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert technique.report() == {"muon_share": matrices / sum(p.numel() for p in model.parameters())}
    assert isinstance(optimizer, MuonAdamW) and "names" not in optimizer.param_groups[0]
