"""Train ranks apart for many steps, and give their mean movement to an outer optimizer as a gradient.

Each rank k takes H steps from the common weights w with its own optimizer (AdamW) and arrives at w_k.  Then

    d = w - 1/K sum_k w_k                  outer gradient
    v <- outer_momentum * v + d
    w <- w - outer_lr * (d + outer_momentum * v)         Nesterov

and all ranks continue from w.  This sends 1/H as much as an exchange of gradients at every step.  Optimizer states stay
with their ranks.  With ``outer_lr=1`` and ``outer_momentum=0`` it is `LocalSGD`.  On one rank it looks ahead, with
momentum.  Evaluations and checkpoints that are due between two meetings wait for the next one, and the run ends with
one.

Recommendation: Use DiLoCo if you pre-train on ranks with a slow network between them.
When to use: Pre-training on ranks with a slow network between them.
When not to use:
- One machine with a fast interconnect, because the exchange costs little.
- Runs of a few meetings, in which the outer momentum has no time to build up.
Differences from the paper: The default of H is for runs of some hundred steps.
Reference: Douillard et al. (2023), DiLoCo: Distributed Low-Communication Training of Language Models,
https://arxiv.org/abs/2311.08105.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.technique import Positive, State
from hf_accel.updates.rounds import Rounds
from hf_accel.weights import local_parameters


@torch.no_grad()
def nesterov(anchor: Tensor, velocity: Tensor, mean: Tensor, lr: float, momentum: float) -> None:
    """Take one outer step in place: ``anchor`` is w, ``velocity`` v and ``mean`` the mean of the ranks' w_k."""
    gradient = anchor - mean
    velocity.mul_(momentum).add_(gradient)
    anchor.sub_(lr * (gradient + momentum * velocity))


@dataclass(eq=False)
class DiLoCo(Rounds):
    """Every few steps, give the mean movement of the ranks to an outer Nesterov optimizer.

    Args:
        every: Steps of a rank between two meetings, above 0; H in the paper.
        outer_lr: Learning rate of the outer optimizer, above 0.
        outer_momentum: Momentum of the outer optimizer, in [0, 1).
    """

    every: Annotated[int, at.Gt(0)] = 20  # 500 in the paper, in runs of 88,000 steps
    outer_lr: Positive = 0.7  # section 3.2 of the paper
    outer_momentum: Annotated[float, at.Interval(ge=0, lt=1)] = 0.9  # section 3.2 of the paper
    variations: ClassVar = {"every": 7}
    claims: ClassVar = frozenset({"own_weights", "synchronization"})

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        weights = local_parameters(self.run_.model)  # type: ignore[union-attr]
        self.anchors_ = {name: weight.clone() for name, weight in weights.items()}
        self.velocities_ = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def meet(self, weights: Mapping[str, Tensor]) -> None:
        """Let every rank continue from the result of the outer step."""
        for name, weight in weights.items():
            anchor = self.anchors_[name]
            nesterov(anchor, self.velocities_[name], self.mean(weight), self.outer_lr, self.outer_momentum)
            weight.copy_(anchor)

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        state: dict[str, Any] = dict(super().state_dict(scope))
        if scope == "global":
            state |= {"anchors": self.anchors_, "velocities": self.velocities_}
        return state

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        super().load_state_dict(scope, state)
        if scope == "global":
            for kept, saved in ((self.anchors_, state["anchors"]), (self.velocities_, state["velocities"])):
                for name, tensor in kept.items():
                    tensor.copy_(saved[name])
