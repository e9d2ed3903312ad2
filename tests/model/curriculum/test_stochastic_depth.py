import numpy as np
import pytest
import torch
from architectures import inputs_for, tiny, used
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from hf_accel import ProgressiveLayerDrop, RandomTokenDrop, StochasticDepth
from hf_accel.model.curriculum.stochastic_depth import keep_probabilities
from hf_accel.surgery.blocks import block_lists
from hf_accel.testing import tiny_llama, tiny_trainer


class State:
    global_step, max_steps = 3, 8


def begun(model, tmp_path, technique):
    args = TrainingArguments(tmp_path, use_cpu=True, seed=5)
    technique.on_train_begin(args, State(), None, model=model)
    technique.on_step_begin(args, State(), None)
    return technique


def test_probabilities_fall_in_a_straight_line():
    assert keep_probabilities(5, 0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert keep_probabilities(1, 0.2) == [1.0]


def without_randomness(model):
    """In training, without dropout, and with batch norms that know no other examples."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        for field in ("attention_dropout", "attn_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model


def blocks_with_probabilities(name, model, keep):
    """Each block, or branch of a ResNet, and how probably it is kept, by its place in its stack."""
    if name == "ResNet":
        stacks = [[layer.layer for stage in model.resnet.encoder.stages for layer in stage.layers]]
    else:
        stacks = [list(blocks) for blocks in block_lists(model).values()]
    return [(block, 1 - i * (1 - keep) / (len(s) - 1)) for s in stacks for i, block in enumerate(s)]


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "BERT", "RoBERTa", "ModernBERT", "T5", "ViT", "ResNet"])
def test_each_example_is_computed_as_if_alone(name, tmp_path):
    model = without_randomness(used(tiny(name, torch.float64)))
    inputs = {k: torch.cat([v, v.flip(0), v[:1]]) for k, v in inputs_for(name, torch.float64).items()}
    places = blocks_with_probabilities(name, model, 0.3)
    plain = model(**inputs).logits

    technique = begun(model, tmp_path, StochasticDepth(0.3))
    logits, grads = gradients(model, inputs)
    model.eval()
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-6)
    technique.on_train_end(None, None, None)
    without_randomness(model)
    assert torch.equal(model(**inputs).logits, plain)

    summed, skipped = {}, 0
    for example in range(5):
        uniform = np.random.default_rng((5, 3, example)).random(len(places))
        hooks = []
        for (block, q), u in zip(places, uniform, strict=True):

            def change(module, args, kwargs, output, factor=(u < q) / q):
                if name == "ResNet":
                    return output * factor
                x = args[0] if args else kwargs["hidden_states"]
                y = output[0] if isinstance(output, tuple) else output
                y = x + (y - x) * factor
                return (y, *output[1:]) if isinstance(output, tuple) else y

            skipped += u >= q
            hooks.append(block.register_forward_hook(change, with_kwargs=True))
        alone, of_example = gradients(model, {k: v[example : example + 1] for k, v in inputs.items()})
        torch.testing.assert_close(logits[example : example + 1], alone, rtol=1e-5, atol=1e-6)
        for n, gradient in of_example.items():
            summed[n] = summed.get(n, 0) + gradient
        for hook in hooks:
            hook.remove()
    assert skipped and grads.keys() == summed.keys()
    for n, gradient in grads.items():
        torch.testing.assert_close(gradient, summed[n], rtol=1e-4, atol=1e-5 * float(summed[n].abs().max() + 1))


def test_what_is_dropped_is_not_computed(tmp_path):
    """Forward, a block of width h and inner width f takes 2 L (4 h^2 + 3 h f) + 4 L^2 h for an example of L tokens."""
    model, rows, length, h, f = tiny_llama(0.0), 6, 8, 16, 32
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(0))}

    def flops():
        with FlopCounterMode(display=False) as counter:
            model.train()(**inputs)
        return counter.get_total_flops()

    plain = flops()
    technique = begun(model, tmp_path, StochasticDepth(0.3))
    uniform_RL = np.stack([np.random.default_rng((5, 3, i)).random(4) for i in range(rows)])
    kept_L = (uniform_RL < np.array([1.0, 1 - 0.7 / 3, 1 - 1.4 / 3, 0.3])).sum(0)
    assert kept_L.min() > 0 and kept_L.sum() < rows * 4
    block = 2 * length * (4 * h * h + 3 * h * f) + 4 * length**2 * h
    assert plain - flops() == (rows * 4 - kept_L.sum()) * block
    assert technique.report() == {"kept": pytest.approx(kept_L.sum() / (rows * 4))}
    technique.on_train_end(None, None, None)


@pytest.mark.parametrize("others", [[], [ProgressiveLayerDrop(decay=10.0)], [RandomTokenDrop()]])
@pytest.mark.parametrize("last", [False, True])
def test_it_trains_beside_others_that_skip(others, last, tmp_path):
    technique = StochasticDepth()
    together = [*others, technique] if last else [technique, *others]
    trainer = tiny_trainer(together, tmp_path, activation_checkpointing=True, max_steps=6, micro_batch_size=3)
    kinds = [type(module) for module in trainer.model.modules()]
    trainer.train()
    for entry, member in zip(trainer.receipt.techniques, together, strict=True):
        assert member.took_effect(entry["report"])
    assert kinds == [type(module) for module in trainer.model.modules()]


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"StochasticDepth\(.*needs more than one block.*LlamaForCausalLM has one"):
        begun(tiny("Llama", num_hidden_layers=1), tmp_path, StochasticDepth())
    with pytest.raises(ValueError, match=r"StochasticDepth\(.*Linear has no list of the blocks"):
        begun(torch.nn.Linear(2, 2), tmp_path, StochasticDepth())
    with pytest.raises(ValueError, match=r"StochasticDepth\(keep=0\): keep must be > 0"):
        StochasticDepth(keep=0)
