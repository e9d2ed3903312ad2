"""`LatestWeightAveraging`: against the mean of the last recorded weights of a run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_accel import Budget, LatestWeightAveraging
from hf_accel.optim.averaging.lawa import mean
from hf_accel.testing import losses_of, tiny_trainer

STEPS = 24


class Recording(TrainerCallback):
    """Copies the weights after every step."""

    def __init__(self):
        self.iterates = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.iterates[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def train(techniques, directory, dtype=torch.float64, **args):
    recording = Recording()
    trainer = tiny_trainer(techniques, directory, dtype=dtype, **args)
    trainer.add_callback(recording)
    trainer.train()
    return trainer, recording.iterates


def mean_of(iterates, name, steps):
    return torch.stack([iterates[step][name] for step in steps]).mean(0)


@pytest.mark.parametrize(
    ("num_snapshots", "every", "taken"),
    [
        (5, 0.002, range(1, STEPS + 1)),  # a share of less than a step
        (3, 0.25, [6, 12, 18, 24]),
        (6, 0.25, [6, 12, 18, 24]),  # more than there are
        (2, 0.3, [8, 15, 22]),  # the last steps are in none
    ],
)
def test_the_returned_weights_are_the_mean_of_the_latest_snapshots(num_snapshots, every, taken, tmp_path):
    technique = LatestWeightAveraging(num_snapshots, every)
    trainer, iterates = train([technique], tmp_path)
    latest = list(taken)[-num_snapshots:]
    for name, returned in trainer.model.named_parameters():
        torch.testing.assert_close(returned.detach(), mean_of(iterates, name, latest), rtol=1e-12, atol=1e-14)
    report = trainer.receipt.techniques[0]["report"]
    assert report == {"snapshots": len(taken), "averaged": len(latest)}


def test_each_checkpoint_holds_the_mean_and_the_snapshots(tmp_path):
    plain = tiny_trainer([], tmp_path / "plain")
    plain.train()
    technique = LatestWeightAveraging(3, 0.1)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer, iterates = train([technique], tmp_path / "lawa", torch.float32, **saving)
    assert losses_of(trainer) == losses_of(plain)
    assert not (tmp_path / "lawa" / "checkpoint-2" / "averaged.safetensors").exists()
    taken = [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    for step in range(4, STEPS + 1, 2):
        latest = [s for s in taken if s <= step][-3:]
        checkpoint = tmp_path / "lawa" / f"checkpoint-{step}"
        for name, average in load_file(checkpoint / "averaged.safetensors").items():
            torch.testing.assert_close(average, mean_of(iterates, name, latest))
        state = load_file(checkpoint / "accel_state.safetensors")
        snapshots = {key.rpartition("/")[0] for key in state if "/snapshots/" in key}
        assert len(snapshots) == len(latest)


def test_shares_are_those_of_the_budget(tmp_path):
    technique = LatestWeightAveraging(4, 0.25)
    trainer, iterates = train([Budget("96samples"), technique], tmp_path, lr_scheduler_type="constant")
    assert list(iterates) == list(range(1, 13))
    for name, returned in trainer.model.named_parameters():
        torch.testing.assert_close(returned.detach(), mean_of(iterates, name, [3, 6, 9, 12]), rtol=1e-12, atol=1e-14)


def test_half_precision_is_averaged_in_float32():
    tensors = [torch.tensor([256.0 + i]).bfloat16() for i in (0, 2, 4)] + [torch.tensor([258.0]).bfloat16()] * 300
    assert mean(tensors).dtype == torch.bfloat16
    assert mean(tensors).item() == 258.0  # a sum in bfloat16 would stop growing long before
