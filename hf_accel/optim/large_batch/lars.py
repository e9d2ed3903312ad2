"""Train with momentum SGD and a rate for each layer that is proportional to the length of its weights.

Runs with very large batches have few, long steps, and one rate for all layers is too high for some.  If the gradient is
long against the weights, an update may exceed them.  For each weight w with gradient g,

    v = momentum * v + lr * trust_coefficient * |w| / (|g| + weight_decay * |w|) * (g + weight_decay * w)
    w = w - v

so that an update is at most about lr * trust_coefficient of the weight's length.  Biases and the parameters of norms,
which the trainer does not decay, have v = momentum * v + lr * g.  So do weights that are all zero, because their length
says nothing.

Recommendation: Use LARS if you train convolutional networks in batches of more than about 8,000 images on many devices.
When to use: Convolutional networks in batches of more than about 8,000 images on many devices.  The trainer's learning
rate is multiplied by the trust coefficient, so its order is 1 to 30, with a warm-up.
When not to use:
- Smaller batches, because tuned momentum SGD or AdamW is as good.
- Transformers; use `LAMB`.
Differences from the paper: Biases and norms have no layer-wise rate, as in all later use.
Reference: You et al. (2017), Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import nn

from hf_accel.technique import Positive, Technique
from hf_accel.updates.trust_ratio import EachParameter, groups_for, local, norm, ratio


class LarsSGD(EachParameter):
    """Apply LARS to groups with ``adapted=True``, and momentum SGD to the others."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust_coefficient: float = 1e-3):
        options = {"momentum": momentum, "trust_coefficient": trust_coefficient, "weight_decay": 0.0, "adapted": True}
        super().__init__(params, {"lr": lr, **options})

    def update(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Update one parameter by its velocity."""
        decay = group["weight_decay"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        rate = group["lr"]
        if group["adapted"]:
            length = norm(p)
            rate = rate * ratio(group["trust_coefficient"] * length, norm(p.grad) + decay * length)
        velocity, weight = local(state["momentum_buffer"]), local(p)
        velocity.mul_(group["momentum"]).add_(rate * (local(p.grad) + decay * weight))
        weight.sub_(velocity)


@dataclass(eq=False)
class LARS(Technique):
    """Train with LARS.

    Args:
        momentum: Decay of the velocity per step, in [0, 1).
        trust_coefficient: Length of an update relative to the weights, at a learning rate of 1, above 0.
    """

    momentum: Annotated[float, at.Interval(ge=0, lt=1)] = 0.9  # You et al.
    trust_coefficient: Positive = 1e-3  # You et al.
    refused_backends: ClassVar = {"zero": "it flattens parameters, and LARS needs the norm of each"}

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer, with a layer-wise rate for decayed parameters only; the trainer's betas are not read."""
        parts, args = groups_for(self, model, groups), self.run_.args
        return LarsSGD(parts, args.learning_rate, self.momentum, self.trust_coefficient)
