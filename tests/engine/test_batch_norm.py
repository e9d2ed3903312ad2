"""Averaged weights have statistics of batch normalization of their own: evaluated, saved, returned, resumed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import assert_backend, backend_args, run_on_ranks
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn
from torch.utils.data import IterableDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer

from hf_accel import ExponentialMovingAverage, LatestWeightAveraging, StochasticWeightAveraging
from hf_accel.engine.batch_norm import layers
from hf_accel.technique import Technique
from hf_accel.testing import largest_difference, losses_of, tiny_llama, tiny_trainer, weights_of
from hf_accel.weights import gather

EVERY = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 8, "eval_steps": 8}
TECHNIQUES = {
    "ema": ExponentialMovingAverage(3.0),
    "swa": StochasticWeightAveraging(start=0.1),
    "lawa": LatestWeightAveraging(),
}


def tiny_resnet():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetForImageClassification(config)


def train(techniques, directory, resume=None, trainer_class=None, **args):
    kind = {} if trainer_class is None else {"trainer_class": trainer_class}
    trainer = tiny_trainer(techniques, directory, model=tiny_resnet(), modality="image", **kind, **(EVERY | args))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def by_torch(averages, dataset):
    """The model with statistics by torch's own function, over the examples in an order that the seed gives."""
    model = tiny_resnet()
    model.load_state_dict(averages)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(7))
    update_bn(torch.stack([dataset[int(i)]["pixel_values"] for i in order]).split(8), model)
    return dict(model.named_buffers())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_averages_are_evaluated_saved_and_returned_with_their_own_statistics(name, tmp_path):
    plain = train([], tmp_path / "plain", trainer_class=Trainer)
    trainer = train([TECHNIQUES[name]], tmp_path / "run")
    assert losses_of(trainer) == losses_of(plain)
    for step, loss in zip((8, 16, 24), logged(trainer), strict=True):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        averaged, raw = load_file(checkpoint / "averaged.safetensors"), load_file(checkpoint / "model.safetensors")
        beside = load_file(tmp_path / "plain" / checkpoint.name / "model.safetensors")
        assert all(torch.equal(raw[key], beside[key]) for key in raw), "the statistics of training are as without"
        assert averaged.keys() == raw.keys()
        for key, expected in by_torch(averaged, trainer.train_dataset).items():
            torch.testing.assert_close(averaged[key], expected, rtol=1e-5, atol=1e-6)
        first = "resnet.embedder.embedder.normalization.running_mean"
        assert not torch.allclose(averaged[first], raw[first], rtol=1e-3)

        model = tiny_resnet()
        model.load_state_dict(averaged)
        alone = tiny_trainer([], tmp_path, trainer_class=Trainer, model=model, modality="image")
        assert alone.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(value, averaged[key]) for key, value in weights_of(trainer).items())
    assert trainer.evaluate()["eval_loss"] == logged(trainer)[-1]
    assert trainer.receipt.seconds["batch norm"] > 0


def test_resumed_and_best_models_have_them_too(tmp_path):
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = train([TECHNIQUES["ema"]], tmp_path / "run", **worst)
    best = load_file(f"{trainer.state.best_model_checkpoint}/averaged.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in weights_of(trainer).items())
    assert trainer.evaluate()["eval_loss"] == max(logged(trainer))
    resumed = train([TECHNIQUES["ema"]], tmp_path / "resumed", str(tmp_path / "run" / "checkpoint-16"))
    assert logged(resumed) == logged(trainer)[:3]
    last = load_file(tmp_path / "run" / "checkpoint-24" / "averaged.safetensors")
    assert all(torch.equal(value, last[key]) for key, value in weights_of(resumed).items())


def test_a_model_without_such_layers_costs_nothing(tmp_path):
    trainer = tiny_trainer([TECHNIQUES["ema"]], tmp_path, model=tiny_llama(), max_steps=1)
    trainer.train()
    assert "batch norm" not in trainer.receipt.seconds
    assert layers(trainer.model) == []


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


def test_a_stream_of_examples_is_refused(tmp_path):
    trainer = tiny_trainer([], tmp_path, model=tiny_resnet(), modality="image", max_steps=3)
    args = {"model": trainer.model, "args": trainer.args, "train_dataset": Stream()}
    with pytest.raises(
        ValueError,
        match=r"ExponentialMovingAverage.* does not support batch normalization with train_dataset \(Stream\)",
    ):
        type(trainer)(**args, techniques=[TECHNIQUES["ema"]])


@pytest.mark.distributed
@pytest.mark.ci
def test_two_ranks_have_the_same_statistics(tmp_path):
    def rank():
        trainer = train([TECHNIQUES["ema"]], tmp_path, per_device_train_batch_size=4, **backend_args("ddp"))
        assert_backend(trainer, "ddp")
        buffers = dict(trainer.model.named_buffers())
        return gather(trainer.model, buffers), {name: buffer.clone() for name, buffer in buffers.items()}

    (saved, first), (nothing, second) = run_on_ranks(rank, timeout=120)
    assert nothing == {} and saved.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    averaged = load_file(tmp_path / "checkpoint-24" / "averaged.safetensors")
    assert all(torch.equal(averaged[name], buffer) for name, buffer in saved.items())


@dataclass(eq=False)
class Kept(Technique):
    """Keeps the first examples of every step, after all were judged."""

    number: int = 8

    def step_select(self, ids_B, losses_B):
        return torch.arange(self.number), None


def test_judging_moves_no_statistics(tmp_path):
    plain = train([], tmp_path / "plain", trainer_class=Trainer)
    whole = train([Kept()], tmp_path / "whole")
    assert largest_difference(weights_of(plain), weights_of(whole)) == 0.0
    part = train([Kept(4)], tmp_path / "part")
    assert all(int(value) == 24 for name, value in weights_of(part).items() if "num_batches_tracked" in name)
