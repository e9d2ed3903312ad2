"""GradientNoiseScale against brute force over all draws, and against gradients of single examples."""

import math
import re
from itertools import product

import pytest
import torch
from transformers.utils import logging

from hf_accel import GradientNoiseScale
from hf_accel.testing import CountingText, largest_difference, losses_of, tiny_trainer, weights_of
from hf_accel.updates.noise_scale import advice, signal_and_noise

EXACT = {"dropout": 0.0, "dtype": torch.float64}


def test_the_estimates_are_unbiased_over_all_draws():
    """A step of four examples, drawn with replacement from three, in parts of one and of three."""
    population = torch.tensor([[1.0, 2.0], [-0.5, 1.0], [0.0, -1.5]], dtype=torch.float64)
    signals, noises = [], []
    for draw in product(range(3), repeat=4):
        g = population[list(draw)]
        parts = [g[:1].sum(0) / 4, g[1:].sum(0) / 4]
        squares = sum(part @ part for part in parts)
        whole = g.mean(0)
        shares = torch.tensor((1 / 4) ** 2 + (3 / 4) ** 2)
        signal, noise = signal_and_noise(whole @ whole, squares, shares, torch.tensor(4.0))
        signals.append(signal)
        noises.append(noise)
    mean = population.mean(0)
    assert torch.stack(signals).mean() == pytest.approx(float(mean @ mean), rel=1e-12)
    assert torch.stack(noises).mean() == pytest.approx(float(population.var(0, correction=0).sum()), rel=1e-12)


def noise_scale_of_examples(model, dataset, collate):
    """B_simple in examples, from the gradient of each example's summed loss; the loss of a step is a mean of items."""
    sums, items = [], []
    for i in range(len(dataset)):
        batch = collate([dataset[i]])
        batch = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
        count = batch["labels"].shape[1] - 1
        loss = model(**batch).loss * count
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        sums.append(torch.cat([g.reshape(-1) for g in gradients]))
        items.append(count)
    sums_NP, items_N = torch.stack(sums), torch.tensor(items, dtype=torch.float64)
    true_P = sums_NP.sum(0) / items_N.sum()
    away_NP = (sums_NP - items_N[:, None] * true_P) / items_N.mean()
    return float((away_NP**2).sum() / (len(dataset) - 1) / (true_P @ true_P))


@pytest.mark.ci
@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_it_is_the_value_of_single_examples(micro_batch_size, tmp_path):
    technique = GradientNoiseScale(half_life=1e9)
    args = {"learning_rate": 0.0, "num_train_epochs": 3, "logging_strategy": "no"}
    trainer = tiny_trainer([technique], tmp_path, micro_batch_size=micro_batch_size, **args, **EXACT)
    trainer.train_dataset = CountingText(160, seed=5)
    expected = noise_scale_of_examples(trainer.model, trainer.train_dataset, trainer.data_collator)
    trainer.train()
    report = trainer.receipt.techniques[0]["report"]
    assert report["measured_steps"] == 60
    assert report["noise_scale"] == pytest.approx(expected, rel=0.15)


def test_training_is_the_same_bit_for_bit(tmp_path):
    runs = []
    for techniques in ([GradientNoiseScale()], []):
        runs.append(tiny_trainer(techniques, tmp_path, micro_batch_size=2, num_train_epochs=1))
        runs[-1].train()
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert largest_difference(*map(weights_of, runs)) == 0.0
    assert not any(p._backward_hooks for p in runs[0].model.parameters())


def test_a_step_that_is_done_again_in_smaller_micro_batches_is_measured_once(tmp_path):
    steady = tiny_trainer([GradientNoiseScale()], tmp_path, num_train_epochs=1, **EXACT)
    steady.train()
    trainer = tiny_trainer([GradientNoiseScale()], tmp_path, micro_batch_size="auto", num_train_epochs=1, **EXACT)
    fours = []

    def fill(module, positional, inputs):
        if module.training:
            rows = len(inputs["input_ids"])
            fours.append(rows == 4)
            if rows == 8 or (sum(fours) == 2 and rows == 4):  # after a backward pass of the first four
                raise torch.OutOfMemoryError("no memory")

    trainer.model.register_forward_pre_hook(fill, with_kwargs=True)
    trainer.train()
    assert trainer.micro_batch_size == 2 and sum(fours) == 2
    reports = [run.receipt.techniques[0]["report"] for run in (steady, trainer)]
    assert reports[0] == pytest.approx(reports[1]) and reports[0]["measured_steps"] == 8


def test_the_report_and_the_log_tell_the_value_over_the_run(tmp_path):
    trainer = tiny_trainer([GradientNoiseScale(half_life=3.0)], tmp_path)
    trainer.train()
    report = trainer.receipt.techniques[0]["report"]
    logged = [entry.get("accel/noise_scale") for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 24 and logged[-1] is not None and logged[-1] == report["noise_scale"]
    over = [report[f"noise_scale_at_{i / 10:g}"] for i in range(1, 11)]
    assert over == [logged[math.ceil(24 * i / 10) - 1] for i in range(1, 11)]
    assert len(set(over) - {None}) > 5


@pytest.mark.parametrize(
    ("value", "batch", "words"),
    [
        (None, 8, "not measured"),
        (math.inf, 8, "hides the signal"),
        (20.0, 64, "Above about 20 examples a step, compute is wasted; the present 64 are too many."),
        (50.0, 64, "the present 64 are about right"),
        (640.0, 64, "Above about 6.4e+02 examples a step, compute is wasted; the present 64 leave room"),
    ],
)
def test_advice_names_both_batches(value, batch, words):
    assert words in advice(value, batch)


def test_one_micro_batch_a_step_is_said_before_training(tmp_path, caplog):
    trainer = tiny_trainer([GradientNoiseScale()], tmp_path, micro_batch_size=8)
    logging.enable_propagation()
    trainer.train()
    logging.disable_propagation()
    sentence = (
        "a step of 8 examples is one micro-batch, so its noise cannot be measured. Set micro_batch_size=4 or less."
    )
    assert sum(sentence in record.message for record in caplog.records) == 1
    report = trainer.receipt.techniques[0]["report"]
    assert (report["noise_scale"], report["measured_steps"]) == (None, 0) and "not measured" in report["advice"]


def test_sharded_training_is_refused_by_name(tmp_path):
    trainer = tiny_trainer([GradientNoiseScale()], tmp_path)
    trainer.is_fsdp_enabled = True
    sentence = f"{GradientNoiseScale()!r} does not support FSDP or DeepSpeed because they exchange gradients"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        trainer.techniques[0].on_train_begin(trainer.args, trainer.state, trainer.control)
