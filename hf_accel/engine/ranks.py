"""Exchange small messages between ranks, outside of training itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_accel.host.view import TrainerView


class Ranks:
    """Exchange values between all ranks, in float64; on one process, return them unchanged."""

    def __init__(self, host: TrainerView):
        self.host = host

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.host.args.world_size

    @functools.cached_property
    def cpu_group(self) -> Any:
        """Return a process group with messages that do not wait for the accelerator."""
        return dist.new_group(backend="gloo")

    def share(self, values: list[float]) -> list[float]:
        """Return the values of rank 0 on every rank."""
        if self.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, 0, group=self.cpu_group)
        return shared.tolist()

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over all ranks."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(sums, group=self.cpu_group)
        return sums.tolist()

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and values from all ranks, on the CPU, without fillers."""
        if self.world_size > 1:
            accelerator, device = self.host.accelerator, self.host.args.device
            ids_B, values_B = ids_B.to(device), values_B.to(device)
            ids_B = accelerator.gather(accelerator.pad_across_processes(ids_B, pad_index=-1))
            values_B = accelerator.gather(accelerator.pad_across_processes(values_B))
        ids_B, values_B = ids_B.cpu(), values_B.detach().cpu()
        return ids_B[ids_B >= 0], values_B[ids_B >= 0]
