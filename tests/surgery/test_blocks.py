"""What a model's blocks are made of, where architectures name it differently."""

import pytest
import torch
from architectures import ARCHITECTURES, inputs_for, tiny, used
from torch import nn
from transformers import AutoModelForCausalLM, Lfm2Config, MixtralConfig

from hf_accel.surgery.blocks import block_lists, block_stacks, residual_projections
from hf_accel.testing import tiny_convnext

ENDS = {
    "Llama": {"self_attn.o_proj", "mlp.down_proj"},
    "Qwen": {"self_attn.o_proj", "mlp.down_proj"},
    "GPT-2": {"attn.c_proj", "mlp.c_proj"},
    "BERT": {"attention.output.dense", "output.dense"},
    "RoBERTa": {"attention.output.dense", "output.dense"},
    "ModernBERT": {"attn.Wo", "mlp.Wo"},
    "T5": {"0.SelfAttention.o", "1.DenseReluDense.wo", "1.EncDecAttention.o", "2.DenseReluDense.wo"},
    "ViT": {"attention.o_proj", "mlp.fc2"},
    "ResNet": {"layer.1.normalization"},
}


def test_blocks_lie_in_stages():
    model = tiny_convnext()
    assert list(block_lists(model)) == [f"convnext.encoder.stages.{i}.layers" for i in range(2)]
    assert block_stacks(model) == [[stage.layers[0] for stage in model.convnext.encoder.stages]]
    t5 = tiny("T5")
    assert block_stacks(t5) == [list(t5.encoder.block), list(t5.decoder.block)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_projections_are_the_ends_of_all_branches(name):
    found = residual_projections(tiny(name))
    branches = {"T5": 2 * 2 + 2 * 3, "ResNet": 4}.get(name, 4 * 2)
    assert len(found) == branches
    assert {max((end for end in ENDS[name] if path.endswith(f".{end}")), key=len) for path in found} == ENDS[name]


@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "ModernBERT", "ViT"])
def test_without_them_a_block_computes_the_identity(name):
    model = used(tiny(name)).eval()
    for layer in residual_projections(model).values():
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        states = model(**inputs_for(name), output_hidden_states=True).hidden_states
    for state in states[1 : len(states) - 1]:  # a final norm follows the last one
        assert torch.equal(state, states[0])


MIXED = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}


@pytest.mark.parametrize(
    "config, sentence",
    [
        (MixtralConfig(**MIXED, num_key_value_heads=2, num_local_experts=2), "MixtralForCausalLM has experts"),
        (
            Lfm2Config(**MIXED, num_key_value_heads=2, full_attn_idxs=[1]),
            r"conv\.out_proj ends a branch that is not attention",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_branches_that_end_otherwise_are_refused(config, sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*Remove the technique for this model"):
        residual_projections(AutoModelForCausalLM.from_config(config))
