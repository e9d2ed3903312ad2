from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_accel.features.segment_attention import NAME, can_attend_by_segment, segment_lengths
from hf_accel.testing import tiny_llama

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
}
MODELS = {
    "llama": lambda: tiny_llama(dropout=0.0, dtype=torch.float64),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)).double(),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
    ).double(),
    "window": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **SMALL)).double(),
}
POSITIONS = torch.tensor([[*range(7), *range(1), *range(9), *range(3)], [*range(20)]])


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_lengths_of_segments():
    assert segment_lengths(POSITIONS) == [[7, 1, 9, 3], [20]]
    assert segment_lengths(POSITIONS[1:]) is None
    assert segment_lengths(torch.zeros(1, 3, dtype=torch.long)) == [[1, 1, 1]]


def test_outputs_and_gradients_are_those_of_masked_attention():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(48, POSITIONS.shape, generator=generator)
    for name, make in MODELS.items():
        model = make()
        model.config.use_cache = False  # as Trainer sets it
        inputs = {"input_ids": ids, "position_ids": POSITIONS}
        padded = {"input_ids": ids, "attention_mask": (torch.arange(20) < torch.tensor([[20], [11]])).long()}
        masked = [gradients(model, **inputs), gradients(model, **padded), gradients(model, input_ids=ids)]
        assert can_attend_by_segment(model, num_rows=2), name
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation(NAME)
        apart = [gradients(model, **inputs), gradients(model, **padded), gradients(model, input_ids=ids)]
        for a, b in zip(masked, apart, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_models_that_will_be_trained_elsewhere_are_left_alone():
    hosts = [SimpleNamespace(args=SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda")]
    assert [can_attend_by_segment(tiny_llama(), run=host) for host in hosts] == [True, False]


def test_models_with_another_attention_are_left_alone():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    assert not can_attend_by_segment(model)
    assert model.config._attn_implementation == "eager"
