"""Stop training the earliest blocks once the norm of their gradient hardly changes.

A frozen block costs its forward pass only.  At each of ``checks`` equal distances from ``start`` on, blocks are frozen
from the first trainable one upwards, as long as their change

    | |g'_l| - |g_l| | / |g'_l|

is below the quantile ``threshold`` of the changes of all trainable blocks.  The norm |g_l| is the root mean square over
the steps since the last check, and |g'_l| that before it.  A plain Trainer gives the clipped gradient.

Recommendation: Do not use GradientNormFreezing unless you study freezing; no gain was shown here.
When to use: Fine-tuning of a pretrained encoder over several epochs.  For freezing by the state of the model, authors
report 19 to 43 % less time.
When not to use: Training from scratch.  Models under ``torch.compile``, which compiles again at each change.  DeepSpeed
ZeRO.
Defaults: ``threshold`` is AutoFreeze's median, ``checks`` its several checks per epoch.  ``start`` and ``max_fraction``
are those of `LayerFreezing`.
Differences from the paper: AutoFreeze takes the norm of the sum of an interval's gradients, which needs a copy of them.
References: Liu et al. (2021), AutoFreeze, https://arxiv.org/abs/2102.01386.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from hf_accel.losses import widest
from hf_accel.surgery.freezing import BlockFreezing
from hf_accel.technique import Fraction


def settled_by_gradient(norms_TL: Sequence[Sequence[float]], depth: int, threshold: float) -> int:
    """Return the number of blocks to freeze, given the norms of their gradients at each check and the frozen ones."""
    if len(norms_TL) < 2 or depth == len(norms_TL[0]):
        return depth
    change_L = [abs(before - now) / before if before else 0.0 for before, now in zip(*norms_TL[-2:], strict=True)]
    limit = np.quantile(change_L[depth:], threshold)
    return next((i for i in range(depth, len(change_L)) if not change_L[i] < limit), len(change_L))


@dataclass(eq=False)
class GradientNormFreezing(BlockFreezing):
    """Freeze blocks whose gradient has settled; needs no more than a plain Trainer.

    Args:
        start: Progress, in [0, 1), before which no block is frozen.
        max_fraction: Largest share of the blocks, in [0, 1], that is frozen.
        threshold: Quantile, in [0, 1], of the trainable blocks' changes below which a block has settled.
        checks: Number of checks per run, at least 2.
    """

    threshold: Fraction = 0.5
    checks: Annotated[int, at.Ge(2)] = 20
    decides_by_weights: ClassVar = True
    counters: ClassVar = (*BlockFreezing.counters, "settled", "looks", "norms", "squares", "squared_steps")
    probe_fields: ClassVar = {"start": 0.25, "threshold": 0.75, "checks": 12}
    variations: ClassVar = {"start": 0.75, "threshold": 0.25}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.settled_, self.looks_ = 0, 0
        self.norms_: list[list[float]] = []
        self.squares_ = torch.zeros(len(self.blocks_), dtype=widest(args.device), device=args.device)
        self.squared_steps_ = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        squares_L = torch.stack([_sum_of_squares(parameters, self.squares_) for parameters in self.trainable_])
        if args.world_size > 1:
            dist.all_reduce(squares_L)  # of shards, or as many times the whole: the ratio is the same
        if self.run_ is not None and args.max_grad_norm > 0:
            norm = self.run_.grad_norm
            norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm).to(squares_L)
            squares_L = squares_L * (norm / args.max_grad_norm).clamp(min=1).square()
        self.squares_ += squares_L.nan_to_num(0.0, posinf=0.0)  # in float16, gradients may be too large
        self.squared_steps_ += 1

    def depth(self, state: TrainerState, model: nn.Module) -> int:
        progress = self.progress(state)
        if (looks := int(progress * self.checks + 1e-9)) > self.looks_:
            self.looks_ = looks
            self.norms_.append((self.squares_ / max(self.squared_steps_, 1)).sqrt().tolist())
            self.squares_.zero_()
            self.squared_steps_ = 0
            if progress >= self.start:
                self.settled_ = min(settled_by_gradient(self.norms_, self.settled_, self.threshold), self.most_)
        return self.settled_


def _sum_of_squares(parameters: Sequence[nn.Parameter], like: Tensor) -> Tensor:
    """Sum the squares of this rank's part of the gradients."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=like.dtype) for gradient in gradients]
    return sum((norm.square() for norm in norms), start=like.new_zeros(()))
