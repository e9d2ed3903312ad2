"""Predicted memory against what the allocator gave in a real step, as torch's profiler recorded it."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from hf_accel.tools.footprint import trace

# peft asks transformers 5.23 what it has renamed.
pytestmark = [pytest.mark.ci, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]

SIZES = {"small": (64, 2, 64, 4), "medium": (128, 4, 96, 4), "large": (192, 6, 128, 6)}
"""Width, blocks, positions, rows."""


def llama(width, blocks):
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000)


def build(family, size):
    """What makes a model, and what makes its batch."""
    width, blocks, length, rows = SIZES[size]
    if family == "causal-lm":
        config = llama(width, blocks)
        make = lambda: AutoModelForCausalLM.from_config(config)  # noqa: E731
        labels = (rows, length)
    else:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
        config = BertConfig(**sizes, num_attention_heads=4, vocab_size=1000)
        make = lambda: AutoModelForSequenceClassification.from_config(config)  # noqa: E731
        labels = (rows,)
    long = {"dtype": torch.long}
    return make, lambda: {"input_ids": torch.zeros(rows, length, **long), "labels": torch.zeros(labels, **long)}


def measured(make, make_inputs, *, rank=None, checkpointing=False, autocast=False):
    """Bytes of the worst moment of the second step: what was there, and what the allocator gave and took."""
    model = make().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if rank is not None:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    inputs = make_inputs()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    there = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers(), *states]}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return sum(there.values()) + int(alive.max())


def predicted(make, make_inputs, *, rank=None, **options):
    found = trace(make, make_inputs, lora_rank=rank, **options)
    return found.weights + 2 * found.gradients + max(found.peak().total, found.gradients)


@pytest.mark.parametrize("rank", [None, 8], ids=["dense", "lora"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["causal-lm", "encoder"])
def test_predicted_memory_is_what_a_step_takes(family, size, rank):
    make, make_inputs = build(family, size)
    assert predicted(make, make_inputs, rank=rank) == pytest.approx(measured(make, make_inputs, rank=rank), rel=0.01)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["causal-lm", "encoder"])
def test_activation_checkpointing_and_mixed_precision(family, autocast):
    make, make_inputs = build(family, "medium")
    options = {"checkpointing": True, "autocast": autocast}
    found = measured(make, make_inputs, **options)
    assert predicted(make, make_inputs, **options) == pytest.approx(found, rel=0.1)
    assert found < measured(make, make_inputs, autocast=autocast)


def test_logits_and_gradients_are_told_apart():
    make, make_inputs = build("causal-lm", "small")
    found = trace(make, make_inputs)
    _, blocks, length, rows = SIZES["small"]
    positions, words = rows * length, 1000
    # In single precision: the logits, their logarithms or gradient, and a copy of the one that is shifted.
    assert found.peak().logits / (positions * words * 4) in (1, 2, 3)
    model = make()
    assert found.gradients == sum(4 * p.numel() for p in model.parameters()) == 4 * found.trained
    assert found.weights == 4 * found.parameters + sum(b.nbytes for b in model.buffers())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert (found.block, found.outside) == (block, found.parameters - blocks * block)
    assert found.alive_TC[-1, 2] == found.gradients


def test_a_share_of_the_gradients():
    make, make_inputs = build("encoder", "small")
    found = trace(make, make_inputs)
    assert found.peak(0.0).gradients == 0
    assert found.peak(0.0).total <= found.peak(0.5).total <= found.peak(1.0).total


def test_no_weights_are_made():
    """A model of 70e9 parameters, on a machine that could not hold it."""
    config = llama(8192, 2)
    config.vocab_size, config.intermediate_size, config.num_attention_heads = 128256, 8 * 8192 * 40, 64
    make = lambda: AutoModelForCausalLM.from_config(config)  # noqa: E731
    ids = lambda: {name: torch.zeros(1, 8, dtype=torch.long) for name in ("input_ids", "labels")}  # noqa: E731
    assert trace(make, ids).weights > 4 * 100e9
