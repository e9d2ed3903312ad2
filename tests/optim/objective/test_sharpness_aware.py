"""SharpnessAware against a hand-written loop of two passes in float64, with dropout, and in runs with planted NaN."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_accel import InfoBatch, SharpnessAware
from hf_accel.optim.objective.sharpness_aware import orthogonal_direction
from hf_accel.testing import largest_difference, losses_of, tiny_convnext, tiny_llama, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def by_hand(trainer, rho, every, reuse, epochs):
    """SGD on Trainer's own batches with its clipping and linear decay, on the flat vector of all weights."""
    model = copy.deepcopy(trainer.model).train()
    parameters = list(model.parameters())
    torch.manual_seed(7)
    loader = tiny_trainer([], trainer.args.output_dir, trainer_class=Trainer, **EXACT).get_train_dataloader()
    losses, direction, step = [], None, 0

    def gradient_at(w, batch):
        nn.utils.vector_to_parameters(w, parameters)
        loss = model(**batch).loss
        return loss.item(), flat(torch.autograd.grad(loss, parameters))

    w = flat(p.detach() for p in parameters)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss, g = gradient_at(w, batch)
            if step % every == 0:
                _, sharp = gradient_at(w + rho * g / g.norm(), batch)
                cosine = sharp @ g / (sharp.norm() * g.norm())
                direction = sharp - sharp.norm() * cosine * g / g.norm()
                update = sharp
            else:
                update = g + reuse * g.norm() / direction.norm() * direction
            update = update * min(1.0, 1.0 / (update.norm().item() + 1e-6))
            w = w - 0.5 * (1 - step / (8 * epochs)) * update
            losses.append(loss)
            step += 1
    nn.utils.vector_to_parameters(w, parameters)
    return dict(model.state_dict()), losses


@pytest.mark.parametrize(
    "technique",
    [SharpnessAware(rho=0.1, every=1), SharpnessAware(rho=0.1, every=3, reuse=0.0), SharpnessAware(rho=0.2, every=3)],
    ids=["SAM", "every third step", "LookSAM"],
)
@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_it_is_two_passes_by_hand(technique, micro_batch_size, tmp_path):
    args = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.5}
    trainer = tiny_trainer([technique], tmp_path, micro_batch_size=micro_batch_size, **args, **EXACT)
    expected, losses = by_hand(trainer, technique.rho, technique.every, technique.reuse, 2)
    trainer.train()
    assert largest_difference(weights_of(trainer), expected) < 1e-10
    assert losses_of(trainer) == pytest.approx(losses, abs=1e-6)
    plain = tiny_trainer([], tmp_path, **args, **EXACT)
    plain.train()
    assert largest_difference(weights_of(plain), expected) > 1e-4
    assert trainer.receipt.techniques[0]["report"] == {
        "extra_passes": math.ceil(16 / technique.every) / 16,
        "left_out_steps": 0,
    }


def test_both_passes_draw_the_same_masks_and_leave_the_generator_as_one_pass_does(tmp_path):
    """With an ascent of no length, the second pass gives the first one's gradient, dropout included."""
    tiny = SharpnessAware(rho=1e-30, every=1)
    runs, states = [], []
    for techniques in ([tiny], []):
        runs.append(tiny_trainer(techniques, tmp_path, dropout=0.5, micro_batch_size=8, num_train_epochs=1))
        runs[-1].train()
        states.append(torch.random.get_rng_state())
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert largest_difference(*map(weights_of, runs)) == 0.0
    assert torch.equal(*states)


def test_statistics_of_batch_normalization_are_those_of_the_first_pass(tmp_path):
    class Normed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm, self.config = inner, nn.BatchNorm2d(3), inner.config

        def forward(self, pixel_values, labels=None):
            return self.inner(pixel_values=self.norm(pixel_values), labels=labels)

    seen = {}
    for name, techniques in (("plain", []), ("sharp", [SharpnessAware(rho=10.0, every=1)])):
        args = {"learning_rate": 0.0, "num_train_epochs": 1, "modality": "image"}
        trainer = tiny_trainer(techniques, tmp_path, model=Normed(tiny_convnext(0.0)), **args)
        trainer.train()
        seen[name] = [buffer.clone() for buffer in trainer.model.norm.buffers()]
    assert int(seen["plain"][2]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["sharp"], strict=True))


def test_losses_are_observed_once_and_at_the_weights(tmp_path):
    class Counting(InfoBatch):
        def observe(self, ids_B, losses_B):
            self.seen_ = getattr(self, "seen_", []) + list(zip(ids_B.tolist(), losses_B.tolist(), strict=True))
            super().observe(ids_B, losses_B)

    seen = []
    for techniques in ([], [SharpnessAware(rho=5.0, every=1)]):
        watching = Counting(keep=1.0)
        args = {"learning_rate": 0.0, "num_train_epochs": 1}
        tiny_trainer([watching, *techniques], tmp_path, **args, **EXACT).train()
        seen.append(watching.seen_)
    assert len(seen[0]) == 64 and seen[0] == seen[1]


def test_mixed_precision_keeps_the_weights_in_full(tmp_path):
    trainer = tiny_trainer([SharpnessAware(rho=0.3, every=2)], tmp_path, bf16=True, learning_rate=0.0)
    trainer.train()
    assert largest_difference(weights_of(trainer), dict(tiny_llama().state_dict())) == 0.0
    assert trainer.receipt.techniques[0]["report"]["extra_passes"] == 0.5


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def poisoned(directory, technique, where, **args):
    """A run whose gradient is NaN in the passes for which ``where(step, number of the pass)`` holds."""
    trainer = tiny_trainer([technique], directory, dropout=0.0, **args)
    passes = {}

    def hook(module, inputs, output):
        if not module.training:
            return output
        step = trainer.state.global_step
        passes[step] = passes.get(step, 0) + 1
        return Poison.apply(output) if where(step, passes[step]) else output

    trainer.model.model.embed_tokens.register_forward_hook(hook)
    return trainer


@pytest.mark.parametrize("which", [1, 2])
def test_a_step_without_a_finite_gradient_is_left_out_and_what_would_be_reused_too(which, tmp_path):
    technique = SharpnessAware(rho=0.1, every=5)
    trainer = poisoned(tmp_path, technique, lambda step, number: step == 10 and number == which)
    before = {}
    begin = technique.on_step_begin

    def remember(args, state, control, **kwargs):
        before[state.global_step] = weights_of(trainer)
        return begin(args, state, control, **kwargs)

    technique.on_step_begin = remember
    trainer.train()
    assert largest_difference(before[10], before[11]) == 0.0
    assert all(largest_difference(before[i], before[i + 1]) > 0 for i in range(23) if i != 10)
    assert all(torch.isfinite(w).all() for w in weights_of(trainer).values())
    assert (trainer.receipt.steps, trainer.receipt.skipped_steps) == (23, 1)
    assert trainer.receipt.techniques[0]["report"] == {"extra_passes": 5 / 24, "left_out_steps": 1}


def test_many_in_a_row_end_the_run_with_a_sentence_and_checkpoints_stay(tmp_path):
    technique = SharpnessAware()
    trainer = poisoned(tmp_path, technique, lambda step, _: step > 6, save_strategy="steps", save_steps=5)
    sentence = f"{technique!r}: the gradients of 10 steps in a row were not finite. Lower learning_rate or rho"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        trainer.train()
    assert all(torch.isfinite(w).all() for w in weights_of(trainer).values())
    resumed = tiny_trainer([SharpnessAware()], tmp_path, dropout=0.0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.clock.progress == 1.0


def test_the_weights_come_back_where_the_second_pass_fails(tmp_path):
    technique = SharpnessAware(rho=1.0, every=1)
    trainer = tiny_trainer([technique], tmp_path, learning_rate=0.0, **EXACT)
    passes = []

    def fail(module, inputs):
        passes.append(module)
        if len(passes) == 6:
            raise OSError("the disk is gone")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert largest_difference(weights_of(trainer), dict(tiny_llama(**EXACT).state_dict())) == 0.0


def test_weights_of_16_bits_are_refused(tmp_path):
    trainer = tiny_trainer([SharpnessAware()], tmp_path, model=tiny_llama().bfloat16())
    with pytest.raises(ValueError, match="SharpnessAware.*torch.bfloat16.*float32 and set bf16=True"):
        trainer.train()


def test_a_gradient_of_zero_makes_no_direction():
    zero, second = {"w": torch.zeros(3)}, {"w": torch.tensor([3.0, 0.0, 4.0])}
    torch.testing.assert_close(orthogonal_direction(second, zero, False)["w"], torch.tensor([0.6, 0.0, 0.8]))
    assert orthogonal_direction(zero, zero, False)["w"].tolist() == [0.0, 0.0, 0.0]
