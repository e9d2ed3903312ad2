"""LAMB: Adam whose update of each layer is as long as its weights, times the learning rate.

In very large batches few, long steps have to do, and one rate for all layers is too high for some.  For each weight w
with gradient g, at update t,

    m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g^2
    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
    w = w - lr * |w| / |u| * u

Biases and the parameters of norms, which is what the trainer does not decay, have w = w - lr * u.  The betas and eps
are the trainer's ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``; the paper has 1e-6 for the last.

Reference: You et al. (2020), Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
https://arxiv.org/abs/1904.00962.  Departures: the norm of w is not clipped; biases and norms have no trust ratio.

When to use: pre-training of transformers in batches of more than about 8,000 sequences on many devices.  Its learning
rate is relative: an update moves a weight by lr of its length, so the order is 1e-3 to 1e-2.
When not to use: smaller batches, where tuned AdamW is as good; fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_accel.optim.large_batch.trust_ratio import groups_for, local, norm, ratio
from hf_accel.technique import Technique


class LambAdam(torch.optim.Optimizer):
    """LAMB in groups whose ``adapted`` is True, Adam with decoupled weight decay in the others."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapted": True})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)  # as torch's own: a tensor, on the CPU
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                step = state["step"].item()
                mean, square = state["exp_avg"].lerp_(p.grad, 1 - beta1), state["exp_avg_sq"]
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
                update.add_(p, alpha=group["weight_decay"])
                rate = group["lr"] * (ratio(norm(p), norm(update)) if group["adapted"] else 1.0)
                local(p).sub_(rate * local(update))
        return loss


@dataclass(eq=False)
class LAMB(Technique):
    """Trains with LAMB, with the trainer's learning rate, weight decay, betas and eps."""

    refused_backends: ClassVar = {"zero": "it flattens parameters, and LAMB needs the norm of each"}

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Each group divided into what is decayed and what is not."""
        parts, args = groups_for(self, model, groups), self.run_.args
        return LambAdam(parts, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
