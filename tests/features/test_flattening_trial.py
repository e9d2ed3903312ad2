import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_accel.features.flattening_trial import flattening_fault

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "use_cache": False,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 4, "mamba_n_groups": 1}


def state_space():
    return FalconH1ForCausalLM(FalconH1Config(**SMALL, **STATES, mamba_chunk_size=8))


def convolution():
    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("make", [state_space, convolution])
def test_what_crosses_is_found_while_fresh_weights_hide_it(make):  # huggingface/transformers#46093
    torch.manual_seed(0)
    model = make()
    assert flattening_fault(model) == "what it computes of one example depends on the one before"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_crosses_where_attention_ends_at_the_border(frozen):
    torch.manual_seed(0)
    assert flattening_fault(LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(not frozen)) is None
