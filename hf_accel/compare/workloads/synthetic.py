"""A task with known answers, to test comparisons themselves.

Training takes a fixed CPU time per example, and the evaluated loss is a formula:

    loss = 1 + (useful work / 64)^(-1/2) + noise

So a technique that skips half of the compute without harm is exactly twice as fast, and one that does nothing is not
faster.  One that only ends earlier is on the baseline's own curve: not faster, either.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_accel.compare.workloads.workload import Workload
from hf_accel.technique import Technique

EXAMPLES = 64
BATCH = 8


class Burning(nn.Module):
    """A model that learns nothing and uses CPU time."""

    def __init__(self, seconds: float, noise: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds
        self.noise = noise
        self.seed = torch.initial_seed()
        self.price = 1.0
        self.work = self.paid = 0.0
        self.began: float | None = None

    def to(self, *args: Any, **kwargs: Any) -> Burning:
        """Start the clock of the price; a trainer calls this when it is constructed."""
        self.began = time.process_time() if self.began is None else self.began
        return super().to(*args, **kwargs)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss; in training, do the work of a batch first."""
        if self.training:
            assert self.began is not None
            self.work += len(x)
            self.paid += len(x) * self.price
            burn_until(self.began + self.seconds * self.paid)
        # As in a real run, the noise depends on the seed and on the computation.
        generator = torch.Generator().manual_seed(1000 * self.seed + int(self.paid) + 1)
        noise = self.noise * torch.randn((), generator=generator)
        return {"loss": self.weight.sum() * 0 + 1 + (max(self.work, 1.0) / EXAMPLES) ** -0.5 + noise, "logits": x}


def burn_until(moment: float) -> None:
    """Use CPU time, no matter how much of it other processes leave."""
    while time.process_time() < moment:
        pass


class Numbered(Dataset):
    """Examples with a number and nothing else."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"x": float(index), "labels": 0.0}


@dataclass
class Synthetic(Workload):
    """Runs that take ``seconds`` of CPU time at horizon 1."""

    name = "synthetic"
    budget = "64samples"
    tuned = "nothing to tune: the loss is a formula"
    args = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": EXAMPLES}

    seconds: Annotated[float, at.Gt(0)] = 1.0
    noise: Annotated[float, at.Ge(0)] = 0.01

    def build(self) -> dict[str, Any]:
        data = Numbered()
        return {"model": Burning(self.seconds / EXAMPLES, self.noise), "train_dataset": data, "eval_dataset": data}


@dataclass(eq=False)
class SkipsHalf(Technique):
    """Skips half of the compute and none of the work: the known answer is 2."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.price = 0.5


@dataclass(eq=False)
class DoesNothing(Technique):
    """Takes another trajectory of the same quality, as a useless technique does: the known answer is 1."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.seed += 1


@dataclass(eq=False)
class EndsEarlier(Technique):
    """Stops after half of the steps: the known answer is 1, with a worse loss."""

    share: Annotated[float, at.Interval(gt=0, le=1)] = 0.5

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.seed += 1  # another trajectory, too

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.progress(state) >= self.share
