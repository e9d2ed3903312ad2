"""Residual branches that add nothing at first."""

import pytest
import torch
from architectures import ARCHITECTURES, inputs_for, tiny, used

from hf_accel import ZeroInitResidual
from hf_accel.model.initialization.zero_init_residual import zero_residuals
from hf_accel.testing import tiny_llama, tiny_trainer, weights_of


@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "ModernBERT", "ViT"])
def test_the_model_is_its_embeddings_and_its_head(name):
    """The oracle: the same model with no block at all."""
    model = used(tiny(name)).eval()
    zero_residuals(model)
    without = used(tiny(name)).eval()
    inputs = inputs_for(name)
    for path, module in list(without.named_modules()):
        if isinstance(module, torch.nn.ModuleList):
            without.get_submodule(path)._modules.clear()
            without.config.num_hidden_layers = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, without(**inputs).logits)


def test_a_residual_network_hands_on_what_it_is_given():
    """After a batch norm that gives nothing, a block is its shortcut and its activation."""
    model = tiny("ResNet").eval()
    assert zero_residuals(model) == 4
    block = model.resnet.encoder.stages[0].layers[1]
    x_BCHW = torch.randn(2, 8, 4, 4).relu()
    assert torch.equal(block(x_BCHW), x_BCHW)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "T5"])  # its encoder waits for a step
def test_all_branches_learn(name):
    """Gradients reach the layers that begin at zero."""
    model = tiny(name)
    assert zero_residuals(model) > 0
    model(**inputs_for(name)).logits.square().mean().backward()
    last = [p for n, p in model.named_parameters() if p.abs().sum() == 0 and n.endswith("weight") and p.dim() == 2]
    assert all(p.grad.abs().sum() > 0 for p in last)


def test_the_global_generator_is_left_alone(tmp_path):
    technique = ZeroInitResidual()
    trainer = tiny_trainer([technique], tmp_path)
    expected = tiny_llama().state_dict()
    for name, value in weights_of(trainer).items():
        begins = torch.zeros_like(value) if "o_proj" in name or "down_proj" in name else expected[name]
        assert torch.equal(value, begins)


def test_a_trained_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    trained = type(tiny_llama()).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ZeroInitResidual\(\): the weights of the model from .* would be lost"):
        tiny_trainer([ZeroInitResidual()], tmp_path, model=trained)
