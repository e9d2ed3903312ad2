"""LAMB against its formula, parameter by parameter, in a hand-written loop in float64."""

import copy
import re

import pytest
import torch
from transformers import Trainer

from hf_accel import LAMB
from hf_accel.optim.large_batch.lamb import LambAdam
from hf_accel.testing import largest_difference, tiny_llama, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}
ARGS = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "learning_rate": 0.02, "weight_decay": 0.1}


def by_hand(trainer):
    """Trainer's own batches, clipping and linear decay; norms, the only vectors of the model, have no trust ratio."""
    model = copy.deepcopy(trainer.model).train()
    first, second = ({name: 0.0 for name, _ in model.named_parameters()} for _ in range(2))
    torch.manual_seed(7)
    plain = tiny_trainer([], trainer.args.output_dir, trainer_class=Trainer, **EXACT)
    for t, batch in enumerate(plain.get_train_dataloader(), 1):
        model.zero_grad()
        model(**batch).loss.backward()
        length = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
        clip = min(1.0, 1.0 / (length + 1e-6))
        with torch.no_grad():
            for name, w in model.named_parameters():
                g = w.grad * clip
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.95 * second[name] + 0.05 * g * g
                u = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.95**t)) ** 0.5 + 1e-5)
                trust = 1.0
                if "norm" not in name:
                    u = u + 0.1 * w
                    trust = float((w**2).sum()) ** 0.5 / float((u**2).sum()) ** 0.5
                w -= 0.02 * (1 - (t - 1) / 8) * trust * u
    return dict(model.state_dict())


def test_it_is_its_formula(tmp_path):
    trainer = tiny_trainer([LAMB()], tmp_path, num_train_epochs=1, **ARGS, **EXACT)
    expected = by_hand(trainer)
    trainer.train()
    assert largest_difference(weights_of(trainer), expected) < 1e-10
    assert largest_difference(expected, dict(tiny_llama(**EXACT).state_dict())) > 1e-3


def test_the_first_update_is_as_long_as_the_rate_says():
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    before, weight.grad = weight.detach().clone(), torch.randn(5, 3, dtype=torch.float64)
    LambAdam([{"params": [weight]}], lr=0.01).step()
    assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01)


def test_weights_of_zero_still_learn():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    LambAdam([{"params": [weight]}], lr=0.01, eps=0.0).step()
    assert torch.allclose(weight.detach(), torch.full((3,), -0.01))


def test_a_model_of_norms_only_is_refused(tmp_path):
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    sentence = f"{LAMB()!r} does not support LlamaForCausalLM because only biases and norms are trained."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tiny_trainer([LAMB()], tmp_path, model=model).train()
