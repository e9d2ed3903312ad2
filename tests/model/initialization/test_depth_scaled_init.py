"""Residual branches that begin smaller in deeper models."""

import math

import pytest
import torch
from architectures import tiny

from hf_accel import DepthScaledInit, ZeroInitResidual
from hf_accel.model.initialization.depth_scaled_init import depth_scales, scaled_already
from hf_accel.testing import tiny_llama, tiny_trainer, weights_of


def test_the_last_projections_are_divided_by_the_root_of_their_number(tmp_path):
    trainer = tiny_trainer([DepthScaledInit()], tmp_path)
    expected = tiny_llama().state_dict()
    for name, value in weights_of(trainer).items():
        last = "o_proj" in name or "down_proj" in name
        torch.testing.assert_close(value, expected[name] / math.sqrt(2 * 4) if last else expected[name])


def test_an_encoder_and_a_decoder_count_their_own_branches():
    scales = depth_scales(tiny("T5"), 0.5)
    assert {path.partition(".")[0]: scale for path, scale in scales.items()} == {
        "encoder": pytest.approx((2 * 2) ** -0.5),
        "decoder": pytest.approx((2 * 3) ** -0.5),
    }


@pytest.mark.parametrize("name", ["GPT-2", "ModernBERT"])
def test_architectures_with_a_rule_of_their_own_are_refused(name, tmp_path):
    assert scaled_already(tiny(name))
    model = tiny(name)
    with pytest.raises(
        ValueError, match=rf"{type(model).__name__} starts with smaller residual projections by its own rule"
    ):
        tiny_trainer([DepthScaledInit()], tmp_path, model=model)


@pytest.mark.parametrize("name", ["Llama", "Qwen", "BERT", "RoBERTa", "ViT", "T5"])
def test_others_are_not(name):
    assert not scaled_already(tiny(name))


def test_what_cannot_be_scaled_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    trained = type(tiny_llama()).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weights of the model from .* would be lost"):
        tiny_trainer([DepthScaledInit()], tmp_path, model=trained)
    with pytest.raises(
        ValueError,
        match=r"ZeroInitResidual\(\) and DepthScaledInit\(.* both claim the first weights of the model",
    ):
        tiny_trainer([ZeroInitResidual(), DepthScaledInit()], tmp_path)
