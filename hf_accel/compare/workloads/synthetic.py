"""A task with a known answer, to test comparisons themselves.

Training takes a fixed amount of CPU time for each example, and the loss that is evaluated is a formula:

    loss = 1 + (useful work / 64)^(-1/2) + noise

So a technique that skips exactly half of the compute without harm is exactly twice as fast, one that does nothing is
not faster, and one that only ends earlier is on the baseline's own curve: not faster, either.
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
    """A model that learns nothing, for a price."""

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
        """Called by a trainer's constructor: what it and its host spend from now on is a part of the price."""
        self.began = time.process_time() if self.began is None else self.began
        return super().to(*args, **kwargs)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss so far; while training, a batch of work later."""
        if self.training:
            assert self.began is not None
            self.work += len(x)
            self.paid += len(x) * self.price
            burn_until(self.began + self.seconds * self.paid)
        # Like that of a real run, the noise is that of the seed and of what was computed.
        generator = torch.Generator().manual_seed(1000 * self.seed + int(self.paid) + 1)
        noise = self.noise * torch.randn((), generator=generator)
        return {"loss": self.weight.sum() * 0 + 1 + (max(self.work, 1.0) / EXAMPLES) ** -0.5 + noise, "logits": x}


def burn_until(moment: float) -> None:
    """Use CPU time, however much of it other processes leave."""
    while time.process_time() < moment:
        pass


class Numbered(Dataset):
    """Examples that are told apart and nothing else."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"x": float(index), "labels": 0.0}


@dataclass
class Synthetic(Workload):
    """A run of horizon 1 takes ``seconds`` of CPU time."""

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
    """Half of the compute, all of the work: the known answer is 2."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.price = 0.5


@dataclass(eq=False)
class DoesNothing(Technique):
    """Another trajectory of the same quality, as of most techniques that are of no use: the known answer is 1."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.seed += 1


@dataclass(eq=False)
class EndsEarlier(Technique):
    """Half of the steps, half of the work: the known answer is 1, and a worse loss."""

    share: Annotated[float, at.Interval(gt=0, le=1)] = 0.5

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.seed += 1  # another trajectory, too

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.progress(state) >= self.share
