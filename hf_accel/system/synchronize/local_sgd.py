"""Train each rank by itself, and average the weights of all ranks every few steps.

With data parallelism, every step waits for an exchange of gradients as large as the model.  Here, a rank k trains on
its own part of each step batch with its own optimizer, and after every H steps

    w_k <- 1/K sum_j w_j

so that 1/H as much is sent.  The gradients of a step are no longer those of the whole batch.  Each rank's updates are
as noisy as its part of the batch.  Evaluations and checkpoints that are due between two meetings wait for the next one.

Recommendation: Use LocalSGD if your ranks have a slow network between them and most of a step is waiting.
When to use: Ranks with a slow network between them, if waiting takes most of a step.
When not to use:
- One machine with a fast interconnect.
- Techniques that decide by the gradient of the whole step.
- Runs for which `DiLoCo` fits; it reaches further with the same messages.
Differences from the paper: None.
References: Stich (2019), Local SGD converges fast and communicates little, https://arxiv.org/abs/1805.09767; Lin et al.
(2020), Don't use large mini-batches, use local SGD, https://arxiv.org/abs/1808.07217.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.updates.rounds import Rounds


@dataclass(eq=False)
class LocalSGD(Rounds):
    """Average the ranks' weights every few steps; in between, ranks exchange only the number of tokens of a step.

    Args:
        every: Steps of a rank between two meetings, above 0; H in the paper, which goes up to 16 without loss.
    """

    every: Annotated[int, at.Gt(0)] = 8  # Lin et al.: H of 4 to 16 keeps the accuracy
    variations: ClassVar = {"every": 3}
    claims: ClassVar = frozenset({"own_weights", "synchronization"})

    @torch.no_grad()
    def meet(self, weights: Mapping[str, Tensor]) -> None:
        """Let every rank continue from the mean."""
        for weight in weights.values():
            weight.copy_(self.mean(weight))
