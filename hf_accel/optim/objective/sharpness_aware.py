"""Update with the gradient at the worst point nearby, to find flatter minima.

In image classification, flatter minima may be worth some epochs.  Every ``every``-th step
computes the gradient twice, both times over the whole step batch:

    g = grad L(w)        g_s = grad L(w + rho * g / |g|)        update with g_s

The steps between reuse the new part of g_s, orthogonal to g, which changes slowly (LookSAM):

    h = g_s - (g_s . g / |g|^2) g        update with g + reuse * |g| * h / |h|

|g| is the norm over all parameters, micro-batches and ranks.  The second pass draws the same dropout masks as the
first, so both evaluate one function.  Losses and buffers, such as the statistics of batch normalization, are those of
the first pass.  A copy restores the weights bit for bit.  If a gradient is not finite, in either pass, the step is
skipped; ten such steps in a row end the run.

A step with two passes costs twice the time, and memory for a copy of the weights; with ``reuse``, for three.

Recommendation: Use SharpnessAware if you classify images from scratch or on small data.
When to use: Image classification, from scratch or with small data, where it may be worth some epochs.  Composer's card
reports 0.7 points for 7 % more time with ``every=10``, ``reuse=0`` and ``rho=0.5``.
When not to use:
- Language models.
- Data that are seen once or twice.
Differences from the paper: None.  ``every=1`` is the method of Foret et al.; ``reuse=0`` omits the addition of Liu et
al.
References: Foret et al. (2021), Sharpness-Aware Minimization for Efficiently Improving Generalization,
https://arxiv.org/abs/2010.01412; Liu et al. (2022), Toward Efficient and Scalable Sharpness-Aware Minimization,
https://arxiv.org/abs/2203.02714.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_accel.preserve import buffers_kept, copies_of_buffers, random_state_kept, restore_buffers
from hf_accel.technique import Diverged, Positive, State, Technique
from hf_accel.weights import gather, local_parameters, scatter

logger = logging.get_logger(__name__)

PATIENCE = 10
"""Number of steps in a row without a finite gradient that ends the run."""

Vector = dict[str, Tensor]
"""This rank's part of a vector in the shape of the parameters, by name."""


def dot(a: Vector, b: Vector, sharded: bool) -> Tensor:
    """Return the inner product, over all ranks if they have shards."""
    wide = {name: torch.promote_types(value.dtype, torch.float32) for name, value in a.items()}
    total = torch.stack([(a[name].to(wide[name]) * b[name]).sum() for name in a]).sum()
    if sharded:
        dist.all_reduce(total)
    return total


def orthogonal_direction(second: Vector, first: Vector, sharded: bool) -> Vector:
    """Return the part of ``second`` that is orthogonal to ``first``, scaled to length 1."""
    share = dot(second, first, sharded) / dot(first, first, sharded).clamp(min=1e-30)
    apart = {name: second[name] - (share * first[name]).to(second[name]) for name in second}
    length = dot(apart, apart, sharded).sqrt().clamp(min=1e-30)
    return {name: value / length.to(value) for name, value in apart.items()}


@dataclass(eq=False)
class SharpnessAware(Technique):
    """Train toward flat minima.

    Args:
        rho: Length of the ascent, above 0.
        every: Steps from one that computes the gradient twice to the next, at least 1.
        reuse: Length, relative to the gradient's, of the direction that the steps between add; 0 adds none.
    """

    rho: Positive = 0.05  # Foret et al.
    every: Annotated[int, at.Ge(1)] = 5  # Liu et al.
    reuse: Annotated[float, at.Ge(0)] = 0.7  # Liu et al., alpha
    expected_failed_checks: ClassVar = {"check_bf16_weights": "refused: weights in bfloat16 round the ascent away"}
    refused_backends: ClassVar = {"zero": "its gradients are not accessible to techniques"}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.run_.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. Use DDP or FSDP2."
            )
        narrow = {p.dtype for p in self.run_.model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if narrow:
            raise ValueError(
                f"{self!r} does not support weights in {narrow.pop()} because they round the ascent away. Load the "
                "model with dtype=torch.float32 and set bf16=True."
            )
        self.model_: nn.Module = self.run_.model
        self.direction_: Vector = {}
        self.steps_, self.extra_passes_, self.left_out_, self.in_a_row_ = 0, 0, 0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.buffers_ = copies_of_buffers(self.model_)

    def objective(self, model: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """Compute the gradient at the worst point nearby, or the plain one with the reused direction."""
        run: Any = self.run_
        self.steps_ += 1
        if run.state.global_step % self.every:
            loss = backward()
            self._reuse()
            return loss
        self.extra_passes_ += 1
        with random_state_kept(run.args.device):
            loss = backward()
        first = {name: gradient.clone() for name, gradient in self._gradient().items()}
        before = self._ascend(first)
        self.model_.zero_grad(set_to_none=True)
        try:
            with buffers_kept(self.model_), run.unobserved():
                backward()
        finally:
            with torch.no_grad():
                weights = local_parameters(self.model_)
                for name, weight in before.items():
                    weights[name].copy_(weight)
        if self.reuse and self.every > 1:
            self.direction_ = orthogonal_direction(self._gradient(), first, self._sharded)
        return loss

    @property
    def _sharded(self) -> bool:
        return isinstance(self.model_, FSDPModule)

    def _gradient(self) -> Vector:
        trainable = [p for p in self.model_.parameters() if p.requires_grad]
        pairs = zip(local_parameters(self.model_), trainable, strict=True)
        gradients = {name: p.grad for name, p in pairs if p.grad is not None}
        return {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}

    @torch.no_grad()
    def _ascend(self, gradient: Vector) -> Vector:
        """Move the weights by rho along the gradient, and return copies from before."""
        scale = self.rho / dot(gradient, gradient, self._sharded).sqrt().clamp(min=1e-30)
        weights = local_parameters(self.model_)
        before = {name: weights[name].clone() for name in gradient}
        for name, value in gradient.items():
            weights[name].add_((scale * value).to(weights[name]))
        return before

    @torch.no_grad()
    def _reuse(self) -> None:
        if not self.direction_:
            return
        gradient = self._gradient()
        length = self.reuse * dot(gradient, gradient, self._sharded).sqrt()
        for name in gradient.keys() & self.direction_.keys():
            gradient[name].add_((length * self.direction_[name]).to(gradient[name]))

    def accept_step(self, grad_norm: Tensor | float) -> bool:
        """Skip a step without a finite gradient, and drop its direction."""
        if math.isfinite(grad_norm):
            self.in_a_row_ = 0
            return True
        restore_buffers(self.buffers_)
        self.direction_ = {}
        self.left_out_ += 1
        self.in_a_row_ += 1
        if self.in_a_row_ == PATIENCE:
            raise Diverged(
                f"{self!r}: the gradients of {PATIENCE} steps in a row were not finite. Lower learning_rate or rho, or "
                "check the data of these steps."
            )
        step = self.run_.state.global_step + 1  # type: ignore[union-attr]
        logger.warning(f"{self!r}: the gradient of step {step} is not finite, so the step is skipped.")
        return False

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        """Save counts, and the direction if the next step reuses it, both with scope ``global``."""
        if scope == "rank":
            return {}
        due = self.run_.state.global_step % self.every == 0  # type: ignore[union-attr]
        return {
            "direction": gather(self.model_, {} if due else self.direction_),
            "counts": [self.steps_, self.extra_passes_, self.left_out_, self.in_a_row_],
        }

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if scope == "global":
            self.direction_ = scatter(self.model_, state["direction"])
            self.steps_, self.extra_passes_, self.left_out_, self.in_a_row_ = state["counts"]

    def report(self) -> Mapping[str, Any]:
        """Report additional passes over the data relative to the ordinary ones, and skipped steps."""
        return {"extra_passes": self.extra_passes_ / max(self.steps_, 1), "left_out_steps": self.left_out_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["extra_passes"] > 0
