import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_accel.model.compression.float8_training import Float8Training, multiply_in_float8
from hf_accel.model.compression.lora import add_adapters
from hf_accel.testing import losses_of, tiny_bert, tiny_llama, tiny_trainer


def prepared(technique, model):
    technique.run_ = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    return technique.prepare_model(model)


def rounded(x, kind):
    scale = torch.finfo(kind).max / x.abs().max()
    return (x * scale).to(kind).to(x.dtype) / scale


def test_products_are_those_of_rounded_factors():
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    torch.manual_seed(0)
    layer, x, grad = nn.Linear(32, 16), torch.randn(48, 32, requires_grad=True), torch.randn(48, 16)
    model = nn.Sequential(layer)
    multiply_in_float8(model, {"0": layer}, recipe="tensorwise", emulate=True)
    model(x).backward(grad)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    expected = rounded(x.detach(), e4m3) @ rounded(weight, e4m3).T
    assert (expected - x.detach() @ weight.T).abs().max() > 1e-2
    torch.testing.assert_close(model(x), expected + bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, rounded(grad, e5m2) @ rounded(weight, e4m3), rtol=1e-4, atol=1e-5)
    gradient = rounded(grad, e5m2).T @ rounded(x.detach(), e4m3)
    torch.testing.assert_close(model[0].weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_evaluation_and_state_are_those_of_the_plain_model():
    plain, ids = tiny_llama(), torch.arange(3, 35).view(2, 16)
    model = prepared(Float8Training(emulate=True), tiny_llama())
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
        assert not torch.equal(model.train()(ids).logits, plain.train()(ids).logits)


def test_the_recipe_changes_the_losses(tmp_path):
    recipes = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    runs = []
    for recipe in recipes:
        trainer = tiny_trainer([Float8Training(recipe=recipe, emulate=True)], tmp_path, max_steps=3)
        trainer.train()
        runs.append(tuple(losses_of(trainer)))
    assert len(set(runs)) == 3


@pytest.mark.parametrize(("make_model", "layers"), [(tiny_bert, 12), (tiny_llama, 28)])
def test_layers_are_those_in_blocks_and_no_adapters(make_model, layers):
    for model in (make_model(), add_adapters(make_model(), rank=16, alpha=16)):
        technique = Float8Training(emulate=True)
        model = prepared(technique, model)
        converted = [path for path, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
        assert len(converted) == layers == technique.report()["layers"]
        assert not any("lora_" in path for path in converted)


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"Float8Training\(.*does not support cpu because it has no float8 matrix products\. Use Ada"
    ):
        prepared(Float8Training(), tiny_llama())
    small = tiny_llama()
    for path in [path for path, _ in small.named_modules() if path.endswith("_proj")]:
        small.set_submodule(path, nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"Float8Training\(.*no plain nn\.Linear in a block, with .* multiples of 16"):
        prepared(Float8Training(emulate=True), small)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"Float8Training\(.*torchao is not installed.*hf-accel\[quant\]"):
        prepared(Float8Training(emulate=True), tiny_llama())
