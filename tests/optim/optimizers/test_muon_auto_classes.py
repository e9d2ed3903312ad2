"""Muon on every auto class of transformers, at the sizes of their default configurations, without memory."""

import contextlib
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from hf_accel import Muon
from hf_accel.optim.optimizers.muon import matrices_in

ARGS = SimpleNamespace(learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, optim="adamw_torch")
MAPPINGS = sorted(n for n in vars(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES"))


def classes():
    """The classes of all mappings, with the configuration's name."""
    found = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(modeling_auto, mapping).items():
            for name in names if isinstance(names, tuple | list) else (names,):
                found.setdefault(name, kind)
    return found


def built(name, kind):
    """A model of two blocks, or of the default depth, on the meta device; None where neither can be made here."""
    for sizes in ({"num_hidden_layers": 2}, {}):
        with contextlib.suppress(Exception), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = getattr(transformers, name)(AutoConfig.for_model(kind, **sizes))
            return model if isinstance(model, transformers.PreTrainedModel) else None
    return None


@pytest.mark.full
@pytest.mark.parametrize(("name", "kind"), classes().items(), ids=lambda value: value)
def test_it_takes_two_steps_or_is_refused_by_name(name, kind):
    model = built(name, kind)
    if model is None:
        pytest.skip("its default configuration makes no model here")
    technique = Muon()
    technique.run_ = SimpleNamespace(args=ARGS, is_deepspeed_enabled=False)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    group = {"params": list(named.values()), "names": list(named), "lr": 1e-3, "weight_decay": 0.1, "group": ""}
    try:
        optimizer = technique.optimizer(model, [group])
    except ValueError as error:
        assert f"{name} has no trainable matrix" in str(error)
        return
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for path, matrices in matrices_in(model).items():
        assert math.prod(matrices.shape) == model.get_parameter(path).numel()


@pytest.mark.full
def test_experts_are_as_long_as_their_layers_say():
    """Of the layers that make two of one, and the other, the common side is the model's width."""
    seen = set()
    for name, kind in classes().items():
        if not any("moe" in word or word in name for word in ("Llama4ForC", "GptOssForC", "AriaForC", "MixtralForC")):
            continue
        model = built(name, kind)
        if model is None:
            continue
        found = matrices_in(model)
        for path, module in model.named_modules():
            if not {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys():
                continue
            seen.add(name)
            (_, up_out, up_in), (_, down_out, down_in) = (
                found[f"{path}.{n}"].shape for n in ("gate_up_proj", "down_proj")
            )
            assert up_in == down_out and up_out == 2 * down_in, path
    assert seen >= {"MixtralForCausalLM", "GptOssForCausalLM"} and any("Llama4" in name for name in seen)
