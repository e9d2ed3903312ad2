"""Train with Adam and scale the update of each layer to the length of its weights times the learning rate.

Runs with very large batches have few, long steps, and one rate for all layers is too high for some.  For each weight w
with gradient g, at update t,

    m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g^2
    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
    w = w - lr * |w| / |u| * u

Biases and the parameters of norms, which the trainer does not decay, have w = w - lr * u.  The betas and eps are the
trainer's ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``; the paper has 1e-6 for the last.

Recommendation: Use LAMB if you pre-train transformers in batches of more than about 8,000 sequences on many devices.
When to use: Pre-training of transformers in batches of more than about 8,000 sequences on many devices.  The learning
rate is relative: an update moves a weight by lr of its length, so its order is 1e-3 to 1e-2.
When not to use:
- Smaller batches, because tuned AdamW is as good.
- Fine-tuning.
Differences from the paper:
- The norm of w is not clipped.
- Biases and norms have no trust ratio.
Reference: You et al. (2020), Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
https://arxiv.org/abs/1904.00962.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_accel.technique import Technique
from hf_accel.updates.trust_ratio import EachParameter, groups_for, local, norm, ratio


class LambAdam(EachParameter):
    """Apply LAMB to groups with ``adapted=True``, and Adam with decoupled weight decay to the others."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapted": True})

    def update(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Update one parameter by Adam's direction."""
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor on the CPU, like in torch's optimizers
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step = state["step"].item()
        mean, square = state["exp_avg"].lerp_(p.grad, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        update.add_(p, alpha=group["weight_decay"])
        rate = group["lr"] * (ratio(norm(p), norm(update)) if group["adapted"] else 1.0)
        local(p).sub_(rate * local(update))


@dataclass(eq=False)
class LAMB(Technique):
    """Train with LAMB and the trainer's learning rate, weight decay, betas and eps."""

    refused_backends: ClassVar = {"zero": "it flattens parameters, and LAMB needs the norm of each"}

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer, with a trust ratio for decayed parameters only."""
        parts, args = groups_for(self, model, groups), self.run_.args
        return LambAdam(parts, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
