"""LARS against its formula, parameter by parameter, in a hand-written loop in float64."""

import copy
import re

import pytest
import torch
from transformers import Trainer

from hf_accel import LARS
from hf_accel.optim.large_batch.lars import LarsSGD
from hf_accel.testing import largest_difference, tiny_llama, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}
DECAY = 0.1


def by_hand(trainer, peak, momentum, trust):
    """Trainer's own batches, clipping and linear decay; norms, the only vectors of the model, have no trust ratio."""
    model = copy.deepcopy(trainer.model).train()
    velocity = {name: 0.0 for name, _ in model.named_parameters()}
    torch.manual_seed(7)
    plain = tiny_trainer([], trainer.args.output_dir, trainer_class=Trainer, **EXACT)
    for step, batch in enumerate(plain.get_train_dataloader()):
        lr = peak * (1 - step / 8)
        model.zero_grad()
        model(**batch).loss.backward()
        length = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
        clip = min(1.0, 1.0 / (length + 1e-6))
        with torch.no_grad():
            for name, w in model.named_parameters():
                g = w.grad * clip
                if "norm" in name:
                    rate, decay = lr, 0.0
                else:
                    of_w, of_g = float((w**2).sum()) ** 0.5, float((g**2).sum()) ** 0.5
                    rate, decay = lr * trust * of_w / (of_g + DECAY * of_w), DECAY
                velocity[name] = momentum * velocity[name] + rate * (g + decay * w)
                w -= velocity[name]
    return dict(model.state_dict())


def test_it_is_its_formula(tmp_path):
    technique = LARS(momentum=0.8, trust_coefficient=0.02)
    args = {"num_train_epochs": 1, "learning_rate": 0.5, "weight_decay": DECAY}
    trainer = tiny_trainer([technique], tmp_path, **args, **EXACT)
    expected = by_hand(trainer, 0.5, 0.8, 0.02)
    trainer.train()
    assert largest_difference(weights_of(trainer), expected) < 1e-12
    assert largest_difference(expected, dict(tiny_llama(**EXACT).state_dict())) > 1e-3


def test_the_first_update_is_as_long_as_the_trust_coefficient_says():
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    before, weight.grad = weight.detach().clone(), 1e6 * torch.randn(5, 3, dtype=torch.float64)
    LarsSGD([{"params": [weight]}], lr=2.0, trust_coefficient=0.01).step()
    assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.02)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_of_zero_learn_by_the_plain_rate(decay):
    """As in pytorch_optimizer, for as long as they are zero; afterwards the trust ratio holds."""
    from pytorch_optimizer import LARS

    ours, theirs = (torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(2))
    optimizers = (
        LarsSGD([{"params": [ours], "weight_decay": decay}], lr=1.0, trust_coefficient=0.01),
        LARS([theirs], lr=1.0, momentum=0.9, trust_coefficient=0.01, weight_decay=decay),
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        if step == 0:
            assert torch.equal(ours.detach(), -gradient)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_model_of_norms_only_is_refused(tmp_path):
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    sentence = f"{LARS()!r} does not support LlamaForCausalLM because only biases and norms are trained."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tiny_trainer([LARS()], tmp_path, model=model).train()
