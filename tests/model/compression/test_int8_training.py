import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_accel.model.compression.int8_training import Int8Training, multiply_in_int8
from hf_accel.testing import tiny_llama


def prepared(technique, model):
    technique.run_ = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    return technique.prepare_model(model)


def product(x, y):
    """Of integers, with a scale for each row of ``x`` and each column of ``y``."""
    rows, columns = np.abs(x).max(1, keepdims=True) / 127, np.abs(y).max(0, keepdims=True) / 127
    return rows * (np.rint(x / rows).astype(np.int64) @ np.rint(y / columns).astype(np.int64)) * columns


@pytest.mark.parametrize("grad_weight", [True, False])
def test_products_are_those_of_integers(grad_weight):
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).double()
    x = torch.randn(48, 32, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(48, 16, dtype=torch.float64)
    multiply_in_int8(layer, grad_weight=grad_weight)
    out = layer(x)
    out.backward(grad)
    weight, bias = (p.detach().numpy() for p in layer.parameters())
    values, grad = x.detach().numpy(), grad.numpy()
    close = {"rtol": 1e-6, "atol": 1e-6}  # torchao rounds in float32
    np.testing.assert_allclose(out.detach(), product(values, weight.T) + bias, **close)
    assert np.abs(product(values, weight.T) - values @ weight.T).max() > 1e-3
    np.testing.assert_allclose(x.grad, product(grad, weight), **close)
    expected = product(grad.T, values) if grad_weight else grad.T @ values
    np.testing.assert_allclose(layer.weight.grad, expected, **close)
    np.testing.assert_allclose(layer.bias.grad, grad.sum(0), **close)


@pytest.mark.parametrize("grad_weight", [True, False])
def test_under_autocast_products_are_those_of_16_bits(grad_weight):
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x, grad = torch.randn(48, 32, requires_grad=True), torch.randn(48, 16).bfloat16()
    multiply_in_int8(layer, grad_weight=grad_weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.backward(grad)
    values, weight, grad = (t.detach().bfloat16().double().numpy() for t in (x, layer.weight, grad))
    close = {"rtol": 0.02, "atol": 0.05}  # of 8 bits
    expected = product(values, weight.T) + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(out.detach().double(), expected, **close)
    np.testing.assert_allclose(x.grad, product(grad, weight), **close)
    expected = product(grad.T, values) if grad_weight else grad.T @ values
    np.testing.assert_allclose(layer.weight.grad, expected, rtol=0.02, atol=0.2)
    np.testing.assert_allclose(layer.bias.grad, grad.sum(0), rtol=0.02, atol=0.1)


def test_inputs_and_gradients_may_be_transposed():
    layer = nn.Linear(32, 16)
    x, grad = torch.randn(32, 3, 48), torch.randn(16, 3, 48)
    multiply_in_int8(layer)
    grads = []
    for arrange in (Tensor.clone, Tensor.contiguous):
        inputs = arrange(x.transpose(0, 2)).requires_grad_()
        layer(inputs).backward(arrange(grad.transpose(0, 2)))
        grads.append(inputs.grad)
    assert torch.equal(*grads)


def test_evaluation_and_state_are_those_of_the_plain_model():
    plain, ids = tiny_llama(), torch.arange(3, 35).view(2, 16)
    model = prepared(Int8Training(), tiny_llama())
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
        assert not torch.equal(model.train()(ids).logits, plain.train()(ids).logits)


def test_what_it_cannot_do_is_refused(monkeypatch):
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=8))
    with pytest.raises(ValueError, match=r"Int8Training\(.*GPT2LMHeadModel has no plain nn\.Linear in a block"):
        prepared(Int8Training(), gpt2)
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantized_training", None)
    with pytest.raises(ValueError, match=r"Int8Training\(.*torchao is not installed.*hf-accel\[quant\]"):
        prepared(Int8Training(), tiny_llama())
