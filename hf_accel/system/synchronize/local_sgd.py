"""Local SGD: each rank takes steps of its own, and every few steps all take the mean of their weights.

With data parallelism every step waits for an exchange of gradients as large as the model.  Here a rank k trains on its
own part of each step batch with its own optimizer, and after every H steps

    w_k <- 1/K sum_j w_j

so that 1/H as much is sent.  Gradients of a step are no longer those of the whole batch: each rank's updates are as
noisy as its part of the batch.  Evaluations and checkpoints that fall due between two meetings wait for the next one.

Reference: Stich (2019), Local SGD converges fast and communicates little, https://arxiv.org/abs/1805.09767; Lin et al.
(2020), Don't use large mini-batches, use local SGD, https://arxiv.org/abs/1808.07217.

When to use: ranks with a slow network between them, where most of a step is spent on waiting.
When not to use: one machine with a fast interconnect; with techniques that decide by the gradient of the whole step.
`DiLoCo` reaches further with the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.system.synchronize.rounds import Rounds


@dataclass(eq=False)
class LocalSGD(Rounds):
    """Averages the ranks' weights every few steps; in between, ranks exchange the number of tokens of a step alone.

    Args:
        every: Steps of a rank between two meetings, above 0; H in the paper, which goes up to 16 without loss.
    """

    every: Annotated[int, at.Gt(0)] = 8  # Lin et al.: H of 4 to 16 keeps the accuracy
    variations: ClassVar = {"every": 3}
    claims: ClassVar = frozenset({"own_weights", "synchronization"})

    @torch.no_grad()
    def meet(self, weights: Mapping[str, Tensor]) -> None:
        """Every rank goes on from the mean."""
        for weight in weights.values():
            weight.copy_(self.mean(weight))
