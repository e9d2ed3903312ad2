"""GradientSpikeGuard against a hand-written rule, and in runs with planted NaN."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hf_accel import AccelTrainer, Budget, ExponentialMovingAverage, GradientSpikeGuard, SharpnessAware
from hf_accel.optim.optimizers.gradient_spike_guard import is_spike
from hf_accel.testing import largest_difference, losses_of, tiny_trainer, weights_of


def test_spikes_are_those_above_the_geometric_mean():
    choose = random.Random(0)
    guard = GradientSpikeGuard(max_ratio=3.0, patience=100)
    guard.mean_log_norm_, guard.seen_, guard.refused_, guard.in_a_row_, guard.buffers_ = 0.0, 0, 0, 0, []
    accepted = []
    for _ in range(50):
        norm = math.exp(choose.gauss(0, 1))
        mean = math.exp(sum(map(math.log, accepted)) / len(accepted)) if accepted else None
        expected = len(accepted) < 5 or norm <= 3.0 * mean
        assert guard.accept_step(norm) == expected
        if expected:
            accepted.append(norm)
    assert 0 < guard.refused_ < 25


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(norm):
    assert is_spike(norm, 0.0, 0, math.inf)


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def poisoned(directory, steps, *techniques, **args):
    """A run whose gradient is NaN at the given steps."""
    trainer = tiny_trainer(techniques, directory, dropout=0.0, **args)

    def hook(module, inputs, output):
        return Poison.apply(output) if trainer.state.global_step in steps and module.training else output

    trainer.model.model.embed_tokens.register_forward_hook(hook)
    trainer.train()
    return trainer


def test_a_nan_leaves_weights_and_moments_alone(tmp_path):
    trainer = poisoned(tmp_path, {4, 9}, GradientSpikeGuard())
    assert all(torch.isfinite(w).all() for w in weights_of(trainer).values())
    assert (trainer.receipt.skipped_steps, trainer.receipt.steps) == (2, 22)
    assert trainer.receipt.techniques[0]["report"] == {"accepted": 22, "refused": 2}
    states = trainer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {22}


def test_a_budget_of_updates_is_not_spent_on_refused_ones(tmp_path):
    trainer = poisoned(tmp_path, {4, 9}, Budget("10steps"), GradientSpikeGuard())
    assert (trainer.receipt.steps, trainer.receipt.skipped_steps, trainer.state.global_step) == (10, 2, 12)
    assert trainer.clock.spent["steps"] == 10


def test_it_resumes_with_what_it_has_seen(tmp_path):
    straight = poisoned(tmp_path / "a", {4, 9}, GradientSpikeGuard(), save_strategy="steps", save_steps=6)
    resumed = tiny_trainer([GradientSpikeGuard()], tmp_path / "b", dropout=0.0)
    resumed.model.model.embed_tokens.register_forward_hook(
        lambda m, i, o: Poison.apply(o) if resumed.state.global_step in {4, 9} and m.training else o
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    assert resumed.receipt.techniques[0]["report"] == straight.receipt.techniques[0]["report"]


def test_many_in_a_row_end_the_run_with_a_sentence(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"GradientSpikeGuard\(max_ratio=10.0, patience=3\): 3 updates in a row were refused"
    ):
        poisoned(tmp_path, set(range(5, 20)), GradientSpikeGuard(patience=3))


def test_a_plain_trainer_is_refused(tmp_path):
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer)
    trainer.add_callback(GradientSpikeGuard())
    with pytest.raises((TypeError, ValueError), match="GradientSpikeGuard.*needs accept_step"):
        trainer.train()


@pytest.mark.parametrize(
    "techniques",
    [[GradientSpikeGuard()], [SharpnessAware(every=1)], [GradientSpikeGuard(), ExponentialMovingAverage(2)]],
    ids=["guard", "SAM", "guard and average"],
)
def test_a_refused_step_leaves_the_statistics_of_batch_norm_alone(techniques, tmp_path):
    torch.manual_seed(0)
    pixels = torch.randn(8, 3, 16, 16)
    examples = [{"pixel_values": pixels[i], "labels": i % 2} for i in range(8)]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    spoilt = [dict(e, pixel_values=e["pixel_values"] * math.nan) for e in examples]
    arguments = {"per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True, "report_to": [], "seed": 1}
    args = TrainingArguments(
        tmp_path, disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential", **arguments
    )
    data = examples[:4] + spoilt[4:]
    trainer = AccelTrainer(model=model, args=args, train_dataset=data, eval_dataset=examples, techniques=techniques)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append({name: b.clone() for name, b in model.named_buffers()})

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer.receipt.skipped_steps == len(seen) // 2 >= 2
    for i, (before, after) in enumerate(itertools.pairwise(seen)):  # every second batch is spoilt
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if i % 2 == 0 else not all(same)
    assert all(buffer.isfinite().all() for buffer in trainer.model.buffers())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


class Scaled:
    """Stands for AccelTrainer with a gradient scaler, which needs an accelerator."""

    clock, is_deepspeed_enabled = None, False
    accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))


def test_an_overflow_in_fp16_is_left_to_the_scaler():
    guard, model = GradientSpikeGuard(patience=3), torch.nn.BatchNorm1d(2)
    guard.run_ = Scaled()
    guard.on_train_begin(SimpleNamespace(max_grad_norm=1.0), None, None, model=model)
    for _ in range(20):  # as the first steps, until the scale has fallen
        guard.on_step_begin(None, None, None, model=model)
        model(torch.full((4, 2), math.nan))
        assert guard.accept_step(math.inf)
    assert guard.report() == {"accepted": 0, "refused": 0}
    assert all(b.isfinite().all() for b in model.buffers())
    assert all(guard.accept_step(1.0) for _ in range(5)) and not guard.accept_step(100.0)
    with pytest.raises(ValueError, match="does not support fp16 with max_grad_norm=0 .* Set max_grad_norm"):
        guard.on_train_begin(SimpleNamespace(max_grad_norm=0.0), None, None, model=model)
