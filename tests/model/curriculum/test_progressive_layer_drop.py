import math
from collections import Counter

import numpy as np
import pytest
import torch
from architectures import inputs_for, tiny, used
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments

from hf_accel import LayerFreezing, ProgressiveLayerDrop, RandomTokenDrop
from hf_accel.model.curriculum.progressive_layer_drop import keep_probabilities
from hf_accel.surgery.blocks import block_lists
from hf_accel.testing import tiny_llama, tiny_trainer


def test_probabilities_are_their_equation():
    for progress in (0.0, 0.01, 0.3, 1.0):
        theta = 0.7 * math.exp(-20 * progress) + 0.3
        found = keep_probabilities(progress, 5, keep=0.3, decay=20.0)
        assert found.tolist() == pytest.approx([1 - i / 5 * (1 - theta) for i in range(5)])
    assert (keep_probabilities(0.0, 5, keep=0.3, decay=20.0) == 1).all()


class State:
    global_step = max_steps = 0


def begun(model, tmp_path, technique, step, max_steps=100):
    args, state = TrainingArguments(tmp_path, use_cpu=True, seed=5), State()
    state.global_step, state.max_steps = step, max_steps
    technique.on_train_begin(args, state, None, model=model)
    technique.on_step_begin(args, state, None)
    return technique


def test_draws_keep_each_block_as_probably_as_said(tmp_path):
    model, technique, kept = tiny_llama(), ProgressiveLayerDrop(decay=1.0), Counter()
    for step in range(2000):
        begun(model, tmp_path, technique, step, max_steps=2 * step or 1)  # progress 1/2
        kept.update(i for i, block in enumerate(model.model.layers) if block not in technique.dropped_)
        technique.on_train_end(None, None, None)
    for i, q in enumerate(keep_probabilities(0.5, 4, keep=0.5, decay=1.0)):
        assert abs(kept[i] - 2000 * q) <= 4 * math.sqrt(2000 * q * (1 - q) + 1)


NAMES = ["Llama", "Qwen", "GPT-2", "BERT", "RoBERTa", "ModernBERT", "T5", "ViT"]


def scaled_by_hand(model, technique):
    """Hooks that put the input in the place of what is left out, and scale the rest."""
    handles = []
    for blocks in block_lists(model).values():
        for i, block in enumerate(blocks):
            q = 1 - i / len(blocks) * (1 - technique.theta)
            if block in technique.left_out:
                q = math.inf

            def change(module, args, kwargs, output, q=q):
                x = args[0] if args else kwargs["hidden_states"]
                y = output[0] if isinstance(output, tuple) else output
                y = x + (y - x) / q
                return (y, *output[1:]) if isinstance(output, tuple) else y

            handles.append(block.register_forward_hook(change, with_kwargs=True))
    return handles


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_what_is_kept(name, tmp_path):
    model = used(tiny(name, torch.float64, **({} if name == "T5" else {"num_hidden_layers": 4})))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field in ("attention_dropout", "attn_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    inputs = inputs_for(name, torch.float64)

    def gradients():
        model.zero_grad(set_to_none=True)
        with FlopCounterMode(display=False) as counter:
            logits = model(**inputs).logits
            logits.square().sum().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters()}, counter.get_total_flops()

    plain, _, plain_flops = gradients()
    technique = ProgressiveLayerDrop(keep=0.3, decay=5.0)
    for step in range(10, 99):
        begun(model, tmp_path, technique, step)
        if technique.dropped_:
            break
        technique.on_train_end(None, None, None)
    technique.theta, technique.left_out = 0.7 * math.exp(-5 * step / 100) + 0.3, set(technique.dropped_)
    logits, grads, flops = gradients()
    model.eval()
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-5)
    model.train()
    technique.on_train_end(None, None, None)
    hooks = scaled_by_hand(model, technique)
    expected, by_hand, _ = gradients()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-7)
    names = {id(p): n for n, p in model.named_parameters()}
    left = {names[id(p)] for block in technique.left_out for p in block.parameters()}
    for n, gradient in grads.items():
        assert (gradient is None) >= (n in left)
        if gradient is not None:
            torch.testing.assert_close(gradient, by_hand[n], rtol=1e-5, atol=1e-6)
        elif by_hand[n] is not None:
            assert not by_hand[n].any()
    assert flops < plain_flops
    for hook in hooks:
        hook.remove()
    again, _, again_flops = gradients()
    assert torch.equal(again, plain) and again_flops == plain_flops


class Weights(TrainerCallback):
    """Which blocks moved in each step, and which were left out."""

    def __init__(self, technique):
        self.technique, self.moved, self.left_out = technique, [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        blocks = model.model.layers
        self.before = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in blocks]

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.left_out.append([block in self.technique.dropped_ for block in model.model.layers])

    def on_step_end(self, args, state, control, model, **kwargs):
        pairs = zip(model.model.layers, self.before, strict=True)
        moved = [[not torch.equal(p, before[name]) for name, p in block.named_parameters()] for block, before in pairs]
        assert all(any(of_block) == all(of_block) for of_block in moved)
        self.moved.append([all(of_block) for of_block in moved])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("others", [[], [LayerFreezing(start=0.0, max_fraction=0.5)], [RandomTokenDrop()]])
def test_what_is_left_out_does_not_learn(checkpointing, others, tmp_path):
    technique = ProgressiveLayerDrop(decay=10.0)
    weights = Weights(technique)
    trainer = tiny_trainer([*others, technique], tmp_path, activation_checkpointing=checkpointing, weight_decay=0.1)
    trainer.add_callback(weights)
    kinds = [type(module) for module in trainer.model.modules()]
    trainer.train()
    freezes = others and isinstance(others[0], LayerFreezing)
    for step, (moved, left_out) in enumerate(zip(weights.moved, weights.left_out, strict=True)):
        frozen = min(2 * step // 24 + 1, 2) if freezes else 0
        assert moved == [i >= frozen and not out for i, out in enumerate(left_out)], step
    assert not any(out[0] for out in weights.left_out) and all(
        any(rows) for rows in list(zip(*weights.left_out, strict=True))[2:]
    )
    report = trainer.receipt.techniques[-1]["report"]
    assert report["dropped"] == np.mean(weights.left_out) > 0.1
    assert kinds == [type(module) for module in trainer.model.modules()]


def test_one_trained_block_is_kept(tmp_path):
    model = tiny_llama().train()
    for step in range(50, 90):
        model.requires_grad_(True)
        technique = begun(model, tmp_path, ProgressiveLayerDrop(keep=0.01), step)
        for i in (0, 1, 2):  # as another technique may, when the step has begun
            model.model.layers[i].requires_grad_(False)
        model(**inputs_for("Llama"))
        assert model.model.layers[3] not in technique.dropped_
        technique.on_train_end(None, None, None)


def test_what_it_cannot_do_is_refused(tmp_path):
    one_block = tiny("Llama", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"ProgressiveLayerDrop\(.*needs more than one block.*LlamaForCausalLM has one"
    ):
        begun(one_block, tmp_path, ProgressiveLayerDrop(), 0)
    with pytest.raises(ValueError, match=r"ProgressiveLayerDrop\(.*ResNet.*no list of the blocks"):
        begun(tiny("ResNet"), tmp_path, ProgressiveLayerDrop(), 0)
    with pytest.raises(ValueError, match=r"ProgressiveLayerDrop\(keep=0.0\): keep must be > 0"):
        ProgressiveLayerDrop(keep=0.0)
    args = TrainingArguments(tmp_path, use_cpu=True)
    args.torch_compile = True
    with pytest.raises(ValueError, match="ProgressiveLayerDrop.*compiled again"):
        ProgressiveLayerDrop().on_train_begin(args, None, None, model=tiny_llama())
