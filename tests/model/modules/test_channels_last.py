import copy

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer

from hf_accel import ChannelsLast
from hf_accel.testing import losses_of, tiny_convnext, tiny_llama, tiny_trainer


def tiny_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config)


def in_order(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("build", [tiny_resnet, lambda: tiny_convnext(dropout=0.0)])
@pytest.mark.parametrize("plain", [True, False])
def test_training_is_the_same_in_the_other_order(build, plain, tmp_path):
    settings = {"modality": "image", "num_train_epochs": 1}
    usual = tiny_trainer([], tmp_path, model=build().double(), dtype=torch.float64, **settings)
    usual.train()
    seen = []

    def see(module, args, output):
        if module.training:
            seen.append((in_order(module.weight), in_order(args[0]), in_order(output)))

    model = build().double()
    technique = ChannelsLast()
    hosting = {"trainer_class": Trainer} if plain else {}
    trainer = tiny_trainer(
        [] if plain else [technique], tmp_path, model=model, dtype=torch.float64, **hosting, **settings
    )
    if plain:
        trainer.add_callback(technique)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(see)
    trainer.train()
    assert seen and all(map(all, seen))
    assert technique.report() == {"convolutions": len(convolutions)}
    assert all(module.weight.is_contiguous() for module in convolutions)
    assert losses_of(trainer) == pytest.approx(losses_of(usual), abs=2e-4)  # logged with four digits
    for name, value in usual.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_a_model_without_convolutions_is_refused(tmp_path):
    trainer = tiny_trainer([ChannelsLast()], tmp_path, model=tiny_llama(), modality="text")
    with pytest.raises(
        ValueError, match=r"ChannelsLast\(\) needs convolutions of images; LlamaForCausalLM has none. Remove"
    ):
        trainer.train()


@torch.no_grad()
def test_moments_that_were_loaded_are_put_in_the_order_of_the_weights(tmp_path):
    model = tiny_resnet()
    trainer = tiny_trainer([ChannelsLast()], tmp_path, model=model, modality="image")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    twin = copy.deepcopy(model)
    expected = torch.optim.AdamW(twin.parameters(), fused=True)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    technique = ChannelsLast()
    technique.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = torch.randn_like(other, memory_format=torch.contiguous_format)
        parameter.grad = other.grad.clone()
        if parameter.dim() == 4:
            parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
            assert all(in_order(value) for value in optimizer.state[parameter].values() if value.dim() == 4)
    optimizer.step()
    expected.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6, check_stride=False)
