import functools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
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
from transformers import default_data_collator as collate

from hf_accel.meters.flops import FlopMeter
from hf_accel.model.curriculum.layer_freezing import (
    LayerFreezing,
    find_blocks,
    frozen_depth,
    settled_by_gradient,
    settled_by_plasticity,
    similarities,
)
from hf_accel.testing import check_neutral_is_trainer, check_resumes_bit_exactly, check_trains, tiny_trainer

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
    with pytest.raises(ValueError, match=r"LayerFreezing\(.*ResNet.*no list of the blocks.*Leave it out"):
        LayerFreezing().on_train_begin(args, None, None, model=resnet)
    args.gradient_checkpointing, args.gradient_checkpointing_kwargs = True, {"use_reentrant": True}
    with pytest.raises(ValueError, match="Set use_reentrant=False"):
        LayerFreezing().on_train_begin(args, None, None, model=tiny())


def oracle_gradient(norms, depth, threshold):
    """AutoFreeze, by hand."""
    before, now = norms[-2], norms[-1]
    change = [abs(b - n) / b for b, n in zip(before, now, strict=True)]
    active = sorted(change[depth:])
    place = threshold * (len(active) - 1)
    low = math.floor(place)
    limit = active[low] + (place - low) * (active[min(low + 1, len(active) - 1)] - active[low])
    while depth < len(change) and change[depth] < limit:
        depth += 1
    return depth


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_gradient_norms_settle_as_autofreeze_says(threshold):
    generator = torch.Generator().manual_seed(0)
    depths = set()
    for depth in (0, 1, 3):
        for _ in range(30):
            norms = (0.1 + torch.rand(2, 6, generator=generator)).tolist()
            found = settled_by_gradient(norms, depth, threshold)
            assert found == oracle_gradient(norms, depth, threshold) >= depth
            depths.add(found)
    assert len(depths) >= (3 if threshold == 0 else 5)
    assert settled_by_gradient(norms[:1], 2, threshold) == 2
    assert settled_by_gradient(norms, 6, threshold) == 6


def test_plasticity_settles_where_it_is_small_twice():
    plasticity = [[1.0, 1.0, 1.0], [0.1, 0.1, 0.5], [0.15, 0.1, 0.1]]
    assert settled_by_plasticity(plasticity[:1], 0, 0.2) == 0
    assert settled_by_plasticity(plasticity[:2], 0, 0.2) == 0
    assert settled_by_plasticity(plasticity, 0, 0.2) == 2
    assert settled_by_plasticity(plasticity, 1, 0.2) == 2
    assert settled_by_plasticity([row[::-1] for row in plasticity], 0, 0.2) == 0  # a prefix only
    assert settled_by_plasticity(plasticity, 0, 0.6) == 3


def test_similarities_are_those_of_each_two():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, row in enumerate(similarities(x)):
        products = [float(x[i].dot(other)) for other in x]
        torch.testing.assert_close(row.tolist(), [p / math.hypot(*products) for p in products])


class Norms(TrainerCallback):
    """The norm of each block's gradient, at every step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.norms.append(
            [
                math.sqrt(sum(float(p.grad.double().square().sum()) for p in block.parameters() if p.grad is not None))
                for block in model.model.layers
            ]
        )


def test_blocks_freeze_by_the_gradients_of_the_run(tmp_path):
    technique, norms = LayerFreezing("gradient_norm", start=0.3, max_fraction=0.75, checks=4), Norms()
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=16, use_cpu=True, report_to=[], learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(tiny(), args, train_dataset=data(), callbacks=[technique, norms]).train()
    means = [
        [math.sqrt(sum(row[i] ** 2 for row in norms.norms[start : start + 4]) / 4) for i in range(4)]
        for start in (0, 4, 8)
    ]
    expected = [0, 0]  # at progress 1/4 nothing is to freeze yet
    for last in (2, 3):
        expected.append(min(oracle_gradient(means[:last], expected[-1], 0.5), 3))
    frozen = [sum(norm == 0.0 for norm in norms.norms[step]) for step in (0, 4, 8, 12)]
    assert frozen == expected and expected[-1] > 0
    assert technique.report()["frozen_blocks"] == expected[-1]


def by_hand(x, y):
    """The similarity-preserving loss of two layers' activations, (N, H) each."""
    a, b = ([[float(r.dot(q)) for q in z] for r in z] for z in (x, y))
    a, b = ([[v / math.hypot(*row) for v in row] for row in m] for m in (a, b))
    return sum((v - w) ** 2 for r, q in zip(a, b, strict=True) for v, w in zip(r, q, strict=True)) / len(a) ** 2


def test_plasticity_is_the_change_of_similarities(tmp_path):
    technique, model = LayerFreezing("plasticity"), tiny().double()
    args = TrainingArguments(tmp_path, use_cpu=True, seed=3)
    technique.on_train_begin(args, None, None, model=model, train_dataloader=DataLoader(data(), collate_fn=collate))
    batch = {k: torch.cat([inputs[k] for inputs in technique.examples_]) for k in ("input_ids", "labels")}
    assert len(batch["input_ids"]) == 16 == len({tuple(row) for row in batch["input_ids"].tolist()})
    modes = [module.training for module in model.eval().train().modules()]
    hidden = []
    for _ in range(2):
        with torch.no_grad():
            hidden.append([h.mean(1) for h in model(**batch, output_hidden_states=True).hidden_states[1:-1]])
            technique._measure(model)
            model.model.layers[1].mlp.down_proj.weight += 0.1
    (found,), hooks = technique.measured_, [len(module._forward_hooks) for module in model.modules()]
    assert found[0] == 0.0 and found[1] > 0
    assert found[:3] == pytest.approx([by_hand(x, y) for x, y in zip(*hidden, strict=True)], rel=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert technique._similarities(model).shape == (4, 16, 16)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(ValueError, match="LayerFreezing.*examples of the training set.*Take policy='gradient_norm'"):
        technique.on_train_begin(args, None, None, model=model, train_dataloader=DataLoader(data(1)))


@pytest.mark.parametrize("policy", ["schedule", "plasticity"])
@pytest.mark.parametrize("check", [check_trains, check_neutral_is_trainer, check_resumes_bit_exactly])
def test_other_policies_keep_the_contract(policy, check, tmp_path):
    check(LayerFreezing(policy, start=0.25, threshold=0.9, checks=12), tmp_path)


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


def test_gradients_are_measured_as_they_were_before_clipping(tmp_path):
    measured = []
    for norm in (0.0, 1e-3):
        technique = LayerFreezing("gradient_norm", checks=4)
        args = {"max_steps": 8, "learning_rate": 0.0, "max_grad_norm": norm}
        tiny_trainer([technique], tmp_path, **args).train()
        measured.append(technique.measured_)
    assert len(measured[0]) > 2 and min(min(norms) for norms in measured[0]) > 1e-3
    for plain, clipped in zip(*measured, strict=True):
        assert clipped == pytest.approx(plain, rel=1e-4)
