import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_accel.contrib.gradient_norm_freezing import GradientNormFreezing, settled_by_gradient
from hf_accel.testing import CountingText, collate_padded, tiny_llama, tiny_trainer


def oracle_gradient(norms, depth, threshold):
    """AutoFreeze, by hand."""
    before, now = norms[-2], norms[-1]
    change = [abs(b - n) / b for b, n in zip(before, now, strict=True)]
    active = sorted(change[depth:])
    place = threshold * (len(active) - 1)
    low = math.floor(place)
    limit = active[low] + (place - low) * (active[min(low + 1, len(active) - 1)] - active[low])
    while depth < len(change) and change[depth] < limit:
        depth += 1
    return depth


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_gradient_norms_settle_as_autofreeze_says(threshold):
    generator = torch.Generator().manual_seed(0)
    depths = set()
    for depth in (0, 1, 3):
        for _ in range(30):
            norms = (0.1 + torch.rand(2, 6, generator=generator)).tolist()
            found = settled_by_gradient(norms, depth, threshold)
            assert found == oracle_gradient(norms, depth, threshold) >= depth
            depths.add(found)
    assert len(depths) >= (3 if threshold == 0 else 5)
    assert settled_by_gradient(norms[:1], 2, threshold) == 2
    assert settled_by_gradient(norms, 6, threshold) == 6


class Norms(TrainerCallback):
    """The norm of each block's gradient, at every step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.norms.append(
            [
                math.sqrt(sum(float(p.grad.double().square().sum()) for p in block.parameters() if p.grad is not None))
                for block in model.model.layers
            ]
        )


def test_blocks_freeze_by_the_gradients_of_the_run(tmp_path):
    technique, norms = GradientNormFreezing(start=0.3, max_fraction=0.75, checks=4), Norms()
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=16, use_cpu=True, report_to=[], learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    text = {"train_dataset": CountingText(32), "data_collator": collate_padded}
    Trainer(tiny_llama(dropout=0.0), args, **text, callbacks=[technique, norms]).train()
    means = [
        [math.sqrt(sum(row[i] ** 2 for row in norms.norms[start : start + 4]) / 4) for i in range(4)]
        for start in (0, 4, 8)
    ]
    expected = [0, 0]  # at progress 1/4 nothing is to freeze yet
    for last in (2, 3):
        expected.append(min(oracle_gradient(means[:last], expected[-1], 0.5), 3))
    frozen = [sum(norm == 0.0 for norm in norms.norms[step]) for step in (0, 4, 8, 12)]
    assert frozen == expected and expected[-1] > 0
    assert technique.report()["frozen_blocks"] == expected[-1]


def test_gradients_are_measured_as_they_were_before_clipping(tmp_path):
    measured = []
    for norm in (0.0, 1e-3):
        technique = GradientNormFreezing(checks=4)
        args = {"max_steps": 8, "learning_rate": 0.0, "max_grad_norm": norm}
        tiny_trainer([technique], tmp_path, **args).train()
        measured.append(technique.norms_)
    assert len(measured[0]) > 2 and min(min(norms) for norms in measured[0]) > 1e-3
    for plain, clipped in zip(*measured, strict=True):
        assert clipped == pytest.approx(plain, rel=1e-4)
