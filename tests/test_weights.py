"""`hf_accel.weights` in one process, on plain, compiled, wrapped and peft models."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_accel.weights import gather, local_parameters, scatter, swap


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_local_parameters_share_memory_and_are_detached():
    model = network()
    for name, weight in local_parameters(model).items():
        assert not weight.requires_grad
        assert weight.data_ptr() == model.get_parameter(name).data_ptr()


def test_frozen_parameters_are_left_out_unless_asked_for():
    model = network()
    model[0].requires_grad_(False)
    assert list(local_parameters(model)) == ["2.weight", "2.bias"]
    assert list(local_parameters(model, trainable_only=False)) == [name for name, _ in model.named_parameters()]


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap", [compiled, checkpoint_wrapper, nn.DataParallel, lambda m: compiled(nn.DataParallel(m))]
)
def test_names_are_those_of_the_bare_model(wrap):
    assert list(local_parameters(wrap(network()))) == list(local_parameters(network()))


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_names_are_those_of_the_bare_model_when_a_block_is_wrapped(wrap):
    model = network()
    model[0] = wrap(model[0])
    assert list(local_parameters(model)) == list(local_parameters(network()))


def test_a_submodule_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert list(local_parameters(model)) == ["module.weight", "module.bias"]


def test_two_swaps_are_the_identity_and_one_exchanges():
    model, inputs = network(), torch.ones(1, 3)
    before, output = copies(local_parameters(model)), model(inputs)
    given = {name: torch.zeros_like(weight) for name, weight in before.items()}
    swap(model, given)
    assert equal(given, before)
    assert not model(inputs).any()
    swap(model, given)
    assert equal(local_parameters(model), before)
    assert torch.equal(model(inputs), output)
    assert not any(tensor.any() for tensor in given.values())


def test_swap_leaves_other_parameters_alone():
    model = network()
    bias = model[0].bias.detach().clone()
    swap(model, {"2.bias": torch.ones(2)})
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(model[2].bias, torch.ones(2))


def test_swap_moves_optimizer_and_gradient_nowhere():
    model = network()
    model(torch.ones(1, 3)).sum().backward()
    parameters, gradients = list(model.parameters()), [p.grad.clone() for p in model.parameters()]
    swap(model, {name: torch.zeros_like(weight) for name, weight in local_parameters(model).items()})
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, gradients, strict=True))


def test_gather_copies_and_scatter_inverts_it():
    model = network()
    full = gather(model, local_parameters(model))
    assert equal(full, dict(model.state_dict()))
    assert full["0.weight"].data_ptr() != model[0].weight.data_ptr()
    parts = scatter(model, full)
    assert equal(parts, full)
    assert parts["0.weight"].data_ptr() != full["0.weight"].data_ptr()


def test_gather_and_scatter_keep_the_dtype_that_they_are_given():
    model = network().to(torch.bfloat16)
    averages = {name: torch.rand(weight.shape) for name, weight in local_parameters(model).items()}
    assert equal(scatter(model, gather(model, averages)), averages)


def test_names_and_shapes_that_do_not_fit_are_refused_by_name():
    model = network()
    with pytest.raises(ValueError, match=r"3\.weight: the model has no such parameter"):
        swap(model, {"3.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"2\.bias\(3,\): the model has \(2,\)"):
        scatter(model, {"2.bias": torch.zeros(3)})


def test_adapters_of_peft_are_the_trainable_part():
    base = network()
    expected = base[0].weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    weights = local_parameters(model)
    assert [name.removeprefix("base_model.model.") for name in weights] == [
        "0.lora_A.default.weight",
        "0.lora_B.default.weight",
        "2.modules_to_save.default.weight",
        "2.modules_to_save.default.bias",
    ]
    swap(model, {name: torch.ones_like(weight) for name, weight in weights.items()})
    assert torch.equal(model.base_model.model[0].base_layer.weight, expected)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in local_parameters(model).values())
