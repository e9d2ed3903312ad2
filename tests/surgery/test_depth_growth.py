"""Deeper models: which block is a copy of which, and what becomes of the function."""

import copy

import pytest
import torch
from architectures import inputs_for, tiny, used
from hypothesis import given
from hypothesis import strategies as st

from hf_accel.surgery.depth_growth import (
    block_path,
    deepened,
    interleaved,
    middle,
    on_top,
    origin,
    repeats,
    stacked,
    zero_residual_branches,
)


def test_operators():
    assert stacked(2, 6) == [0, 1, 0, 1, 0, 1]
    assert interleaved(2, 6) == [0, 0, 0, 1, 1, 1]
    assert on_top(2, 5) == [0, 1, 1, 1, 1]
    assert middle(4, 6) == [0, 1, 2, 1, 2, 3]
    assert middle(4, 8) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert repeats([0, 1, 2, 1, 2, 3]) == [3, 4]


@given(st.integers(1, 12), st.integers(0, 12))
def test_every_block_is_kept_and_ends_stay_ends(depth, more):
    operators = [stacked, interleaved, on_top] + ([middle] if more <= depth else [])
    for operator in operators:
        sources = operator(depth, depth + more)
        assert len(sources) == depth + more and set(sources) == set(range(depth)) and sources[0] == 0
        assert len(repeats(sources)) == more
        assert operator is stacked or sources[-1] == depth - 1
    if more > depth:
        with pytest.raises(ValueError, match="blocks repeat at most once"):
            middle(depth, depth + more)


def test_origin_maps_names_of_the_stack_only():
    assert origin("model.layers.11.mlp.up_proj.weight", "model.layers", [0] * 11 + [7]) == (
        "model.layers.7.mlp.up_proj.weight"
    )
    assert origin("model.norm.weight", "model.layers", [0]) == "model.norm.weight"
    assert origin("model.layers_norm.1.weight", "model.layers", [0, 0]) == "model.layers_norm.1.weight"


@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "BERT", "RoBERTa", "ViT"])
def test_a_deeper_model_computes_with_copies_of_the_blocks(name):
    """The oracle: the blocks of the small model, called in the order of the sources."""
    small = used(tiny(name, torch.float64)).eval()
    sources = [0, 1, 2, 1, 2, 3]
    before = torch.random.get_rng_state()
    grown = deepened(small, sources)
    assert torch.equal(before, torch.random.get_rng_state()) and grown.config.num_hidden_layers == 6
    by_hand = copy.deepcopy(small)
    blocks = by_hand.get_submodule(block_path(by_hand))
    first, second, third, last = blocks
    blocks._modules = {str(i): b for i, b in enumerate([first, second, third, second, third, last])}
    by_hand.config.num_hidden_layers = 6
    if name == "Qwen":
        by_hand.config.layer_types = ["full_attention"] * 6
    by_hand.config.use_cache = grown.config.use_cache = False
    inputs = inputs_for(name, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(grown(**inputs).logits, by_hand(**inputs).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "ViT"])
def test_silent_copies_change_nothing(name):
    small = used(tiny(name, torch.float64)).eval()
    sources = stacked(4, 12)
    grown = deepened(small, sources)
    assert zero_residual_branches(grown, repeats(sources)) == 8 * 2
    inputs = inputs_for(name, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(grown(**inputs).logits, small(**inputs).logits, rtol=0, atol=1e-9)


def test_it_is_saved_as_an_ordinary_model(tmp_path):
    grown = deepened(tiny("GPT-2"), interleaved(4, 8))
    grown.save_pretrained(tmp_path)
    loaded = type(grown).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in grown.state_dict().items())


def test_blocks_of_another_kind_are_no_source():
    with pytest.raises(
        ValueError, match=r"ModernBertForMaskedLM: block 4 of 8 would copy block 0, which differs in kind"
    ):
        deepened(tiny("ModernBERT"), stacked(4, 8))
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration has several stacks of blocks \(encoder.block, dec"
    ):
        deepened(tiny("T5"), stacked(2, 4))
    with pytest.raises(ValueError, match=r"ResNetForImageClassification has no list of the blocks"):
        deepened(tiny("ResNet"), stacked(4, 8))
