"""Keep most weights of the linear layers at zero, and change the set of nonzero ones during training.

Of N weights in the blocks, (1 - sparsity) N are active.  The others are zero and get no update.  Layer l, of shape
(out, in), keeps a share of its weights that grows with its share of rows and columns (ERK):

    density_l = min(1, c * (out + in) / (out * in))        with c such that (1 - sparsity) N are active together

Every ``interval`` of progress p, up to ``stop``, ``rigl`` and ``set`` change the set.  In each layer, the smallest
active weights become inactive, a share of

    drop / 2 * (1 + cos(pi * p / stop))

Then as many inactive ones become active: those with the largest gradients (``rigl``), or random ones (``set``).  They
start at zero, with fresh moments of the optimizer.  A weight that just became inactive takes part in this choice, and
keeps its value if it is chosen.

``magnitude`` starts dense.  Its sparsity rises, with the smallest weights removed each time:

    sparsity * (1 - (1 - min(p / stop, 1))^3)

Weights and gradients are masked, so the model is an ordinary one with zeros in its weights.  Nothing is faster without
kernels that skip zeros.  An average of weights is sparse only once the masks no longer change.

Recommendation: Do not use SparseTraining to save time; use it if you need a sparse model in the end.
When to use: A sparse model is needed in the end, for hardware or kernels that gain from it.
When not to use: Faster training: on GPUs nobody has measured a gain in time.  At 80 to 90 % zeros it takes several
times as many steps to come near the dense model.
Defaults: ``sparsity`` is the smallest in the RigL paper; ``drop`` and ``stop`` are RigL's.  ``interval`` approximates
RigL's 100 of 32,000 steps.
Differences from the paper: The largest weights are active first, not random ones.  A step that changes masks also
updates weights.
References: Evci et al. (2020), RigL, https://arxiv.org/abs/1911.11134; Mocanu et al. (2018), SET,
https://arxiv.org/abs/1707.04780; Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hf_accel.adapters import is_adapted
from hf_accel.surgery.blocks import linear_layers
from hf_accel.technique import Fraction, State, Technique

Share = Annotated[float, at.Interval(gt=0, lt=1)]


def erk_densities(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Return the share of its weights that each layer keeps, in [0, 1]; together (1 - sparsity) of all of them."""
    sizes = [rows * columns for rows, columns in shapes]
    dense: set[int] = set()
    while True:
        remaining = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = remaining / max(sum(sum(shapes[i]) for i in range(len(shapes)) if i not in dense), 1)
        densities = [1.0 if i in dense else scale * sum(shapes[i]) / sizes[i] for i in range(len(shapes))]
        above = {i for i, density in enumerate(densities) if density > 1}
        if not above:
            return densities
        dense |= above


def largest(values: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` largest elements."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.flatten().topk(count).indices] = True
    return mask.view(values.shape)


def moved(mask: Tensor, weight: Tensor, score: Tensor, fraction: float) -> Tensor:
    """Return the mask without the smallest ``fraction`` of the active weights, and with as many others by score.

    The removed weights compete with all others that are inactive.
    """
    alive = int(mask.sum())
    count = int(fraction * alive)
    kept = largest(torch.where(mask, weight.abs(), -torch.inf), alive - count)
    return kept | largest(torch.where(kept, -torch.inf, score), count)


def dropped_fraction(progress: float, *, drop: float, stop: float) -> float:
    """Return the share of the active weights that a change removes."""
    return drop / 2 * (1 + math.cos(math.pi * min(progress / stop, 1.0)))


def risen_sparsity(progress: float, *, sparsity: float, stop: float) -> float:
    """Return the share of zeros of gradual pruning."""
    return sparsity * (1 - (1 - min(progress / stop, 1.0)) ** 3)


@dataclass(eq=False)
class SparseTraining(Technique):
    """Train linear layers with mostly zero weights.

    Args:
        sparsity: Share of zeros among the weights of the linear layers in blocks, in (0, 1).
        method: Choice of the active weights.
        interval: Progress between two changes, in (0, 1).
        drop: Share of the active weights that the first change replaces, in [0, 1]; not used by ``magnitude``.
        stop: Progress, in (0, 1], of the last change.
    """

    sparsity: Share = 0.8
    method: Literal["rigl", "set", "magnitude"] = "rigl"
    interval: Share = 0.01
    drop: Fraction = 0.3
    stop: Annotated[float, at.Interval(gt=0, le=1)] = 0.75
    refused_backends: ClassVar = {
        "fsdp2": "a mask covers a whole matrix",
        "zero": "a mask covers a whole matrix",
    }
    variations: ClassVar = {"interval": 0.5}
    counters: ClassVar = ("masks", "changes", "risen")
    claims: ClassVar = frozenset({"own_weights", "weight_matrices"})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.deepspeed_plugin is not None or args.fsdp or any(isinstance(m, FSDPModule) for m in model.modules()):
            raise ValueError(f"{self!r} does not support FSDP and ZeRO because a mask covers a whole matrix. Use DDP.")
        if is_adapted(model):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because adapters are small. Remove one of the two."
            )
        try:
            layers = {path: layer for path, layer in linear_layers(model).items() if layer.weight.requires_grad}
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        if not layers:
            raise ValueError(
                f"{self!r} needs a trainable linear layer in a block; {type(model).__name__} has none. Remove "
                "SparseTraining."
            )
        self.weights_ = {path: layer.weight for path, layer in layers.items()}
        self.seed_, self.changes_, self.risen_, self.dense_gradient_ = args.seed, 0, 0, True
        self.masks_: dict[str, Tensor] = {}  # made at the first step, or restored
        self.handles_ = [
            weight.register_post_accumulate_grad_hook(self._masking(path)) for path, weight in self.weights_.items()
        ]

    def _masking(self, path: str) -> Any:
        def mask_gradient(weight: Tensor) -> None:
            if not self.dense_gradient_ and weight.grad is not None:
                weight.grad.mul_(self.masks_[path])

        return mask_gradient

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.masks_:
            self.masks_ = {path: torch.ones_like(weight, dtype=torch.bool) for path, weight in self.weights_.items()}
            self._prune(0.0 if self.method == "magnitude" else self.sparsity)
        self.progress_ = min(self.progress(state), self.stop)
        self.due_ = int(self.progress_ / self.interval) > self.changes_
        self.dense_gradient_ = self.due_ and self.method == "rigl"

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self.due_:
            return
        before = dict(self.masks_)
        if self.method == "magnitude":
            self._prune(risen_sparsity(self.progress_, sparsity=self.sparsity, stop=self.stop))
        else:
            self._move()
        for path, weight in self.weights_.items():
            mask, old = self.masks_[path], before[path]
            for moments in optimizer.state.get(weight, {}).values():
                if isinstance(moments, Tensor) and moments.shape == mask.shape:
                    moments.mul_(mask & old)
            weight.mul_(mask)
            if weight.grad is not None:
                weight.grad.mul_(mask)
        self.changes_ = int(self.progress_ / self.interval)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for path, weight in self.weights_.items():  # some optimizers move weights without a gradient
            weight.mul_(self.masks_[path])

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles_:
            handle.remove()

    @torch.no_grad()
    def _prune(self, sparsity: float) -> None:
        """Keep the largest active weights of each layer."""
        shapes = [tuple(weight.shape) for weight in self.weights_.values()]
        for (path, weight), density in zip(self.weights_.items(), erk_densities(shapes, sparsity), strict=True):
            size = weight.abs().masked_fill(~self.masks_[path], -1.0)
            self.masks_[path] = largest(size, round(density * weight.numel()))
            weight.mul_(self.masks_[path])

    def _move(self) -> None:
        """Replace the smallest active weights of each layer."""
        generator = torch.Generator().manual_seed(self.seed_ + 1_000_003 * int(self.progress_ / self.interval))
        fraction = dropped_fraction(self.progress_, drop=self.drop, stop=self.stop)
        for path, weight in self.weights_.items():
            random = torch.rand(weight.shape, generator=generator) if self.method == "set" else None
            if weight.grad is None:
                continue  # frozen, or the step is refused
            score = weight.grad.abs() if random is None else random.to(weight)
            mask = moved(self.masks_[path], weight, score, fraction)
            self.risen_ += int((mask & ~self.masks_[path]).sum())
            self.masks_[path] = mask

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        super().load_state_dict(scope, state)
        self.masks_ = {path: mask.to(self.weights_[path].device) for path, mask in self.masks_.items()}

    def report(self) -> Mapping[str, Any]:
        """Report the share of zeros, and how often an inactive weight became active."""
        total = sum(mask.numel() for mask in self.masks_.values())
        alive = sum(int(mask.sum()) for mask in self.masks_.values())
        return {"layers": len(self.masks_), "zeros": 1 - alive / total, "risen": self.risen_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["zeros"] > 0.9 * self.sparsity
