"""Train full matrices first, and products of two thin ones once their spectra have settled.

The stable rank of a matrix W counts the directions that matter:

    stable_rank(W) = sum of the squared singular values / the largest of them

It falls early in training and then hardly moves.  From progress ``earliest`` on, the stable ranks of the linear layers
in the blocks are measured once per ``interval`` of progress.  The switch comes when their mean change falls below the
share ``tolerance``, or at progress ``latest``.  The best product of a rank replaces each weight of shape (out, in):

    W ~ left @ right        left: (out, rank);  right: (rank, in);  rank = rank_ratio * min(out, in)

Training continues on the factors, with fresh moments of the optimizer.  A layer then costs rank * (out + in) instead of
out * in, forward and backward.  Layers without a saving stay whole, as do embeddings and heads.  The product is
multiplied out after each step, so evaluations, averages and checkpoints have ordinary weights, which
``from_pretrained`` loads.  Memory shrinks by the moments only.

Recommendation: Use LowRankTraining if you train a wide model and have compared its time with that of plain training.
When to use: Wide models, for which the authors measured up to 1.2 times the speed on one GPU; others found no gain.
When not to use: Narrow models, because thin products are no faster than whole ones there.  Activation checkpointing
under DDP.
Defaults: ``rank_ratio`` is Pufferfish's.  ``earliest`` lies between its 0.11 of the epochs on ImageNet and 0.27 on
CIFAR-10.  ``interval``, ``tolerance`` and ``latest`` are not taken from a paper.
Differences from the paper: The change happens at a share of progress at the latest.  Cuttlefish's choice of ranks and
of layers by profiling is missing.
References: Wang et al. (2021), Pufferfish, https://arxiv.org/abs/2103.03936 (the ratio, whole matrices first); Wang et
al. (2023), Cuttlefish, https://arxiv.org/abs/2305.02538 (when to change).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_accel.adapters import is_adapted
from hf_accel.surgery.blocks import linear_layers
from hf_accel.technique import Fraction, State, Technique

Share = Annotated[float, at.Interval(gt=0, lt=1)]


def stable_rank(matrix: Tensor) -> float:
    """Return the sum of the squared singular values over the largest one: between 1 and the rank."""
    singular = torch.linalg.svdvals(matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)))
    return float((singular / singular[0].clamp(min=1e-30)).square().sum())


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best product of a rank, as (out, rank) and (rank, in) of the same norm."""
    exact = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    left, singular, right = torch.linalg.svd(exact, full_matrices=False)
    root = singular[:rank].sqrt()
    return (left[:, :rank] * root).to(matrix.dtype), (root[:, None] * right[:rank]).to(matrix.dtype)


class Factorized(nn.Module):
    """Add two thin matrices to a linear layer, and train by them once they are in use.

    They are not part of its state: saving and loading use the layer's weight.
    """

    left: nn.Parameter
    right: nn.Parameter
    in_use: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.in_use and self.training:
            return F.linear(F.linear(x, self.right), self.left, self.bias)  # type: ignore[arg-type]
        return super().forward(x)  # type: ignore[misc]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}left"], destination[f"{prefix}right"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *lists):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *lists)
        missing_keys[:] = [key for key in missing_keys if key not in (f"{prefix}left", f"{prefix}right")]


class FactorizedLinear(Factorized, nn.Linear):
    """Linear layer that can train by factors."""


class FactorizedConv1D(Factorized, Conv1D):
    """``Conv1D`` of GPT-2, with its weight stored as (in, out), that can train by factors."""


KINDS: Mapping[type, type] = {nn.Linear: FactorizedLinear, Conv1D: FactorizedConv1D}


def whole(layer: Any) -> Tensor:
    """Return a layer's weight as (out, in)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def give_factors(layer: Any, rank: int) -> None:
    """Give a linear layer factors, in place, without using them yet."""
    num_out, num_in = whole(layer).shape
    layer.left = nn.Parameter(layer.weight.new_zeros(num_out, rank))
    layer.right = nn.Parameter(layer.weight.new_zeros(rank, num_in))
    layer.in_use = False
    layer.__class__ = KINDS[type(layer)]


@torch.no_grad()
def use_factors(layer: Any, left: Tensor, right: Tensor) -> None:
    """Train a layer by factors with these values from now on."""
    layer.left.copy_(left)
    layer.right.copy_(right)
    layer.in_use = True
    multiply_out(layer)


@torch.no_grad()
def multiply_out(layer: Any) -> None:
    """Set a layer's weight to the product of its factors."""
    whole(layer).copy_(layer.left @ layer.right)


@dataclass(eq=False)
class LowRankTraining(Technique):
    """Train the linear layers in blocks as products of thin matrices, once their stable ranks have settled.

    Args:
        rank_ratio: Rank of the products as a share of the full rank, in (0, 1).
        earliest: Progress, in [0, 1], of the first measurement; it should follow the learning-rate warm-up.
        interval: Progress between two measurements, in (0, 1).
        tolerance: Mean relative change of the stable ranks over an interval, at least 0, below which they have settled.
        latest: Progress, in [0, 1], at which training by factors starts in any case.
    """

    rank_ratio: Share = 0.25
    earliest: Fraction = 0.2
    interval: Share = 0.05
    tolerance: Annotated[float, at.Ge(0)] = 0.01
    latest: Fraction = 0.5
    neutral: ClassVar = {"tolerance": 0.0, "latest": 1.0}
    variations: ClassVar = {"earliest": 0.48, "interval": 0.2, "tolerance": 10.0}
    refused_backends: ClassVar = {
        "fsdp2": "it decomposes whole matrices",
        "zero": "it decomposes whole matrices",
    }
    claims: ClassVar = frozenset({"layer_types", "own_weights", "slow_weights", "weight_matrices"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.earliest > self.latest:
            raise ValueError(f"{self!r}: earliest is after latest. Lower it.")

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Add factors beside the weights, so that the optimizer has them from the start."""
        assert self.run_ is not None
        args = self.run_.args
        if args.deepspeed_plugin is not None or self.run_.is_fsdp_enabled:
            raise ValueError(f"{self!r} does not support FSDP and ZeRO because they shard the matrices. Use DDP.")
        find_unused = args.ddp_find_unused_parameters
        if args.world_size > 1 and (args.gradient_checkpointing if find_unused is None else not find_unused):
            raise ValueError(
                f"{self!r} leaves parameters unused before and after the change, so DDP must look for them. "
                "Set ddp_find_unused_parameters=True and activation_checkpointing=False."
            )
        if is_adapted(model):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because adapters are thin already. Remove one of "
                "the two."
            )
        try:
            layers = linear_layers(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        for layer in layers.values():
            num_out, num_in = whole(layer).shape
            rank = max(round(self.rank_ratio * min(num_out, num_in)), 1)
            if type(layer) in KINDS and layer.weight.requires_grad and rank * (num_out + num_in) < num_out * num_in:
                give_factors(layer, rank)
        if not any(isinstance(layer, Factorized) for layer in layers.values()):
            raise ValueError(
                f"{self!r}: no trainable linear layer in a block of {type(model).__name__} has fewer weights as a "
                "product. Lower rank_ratio, or remove LowRankTraining."
            )
        return model

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, Factorized)}
        self.layers_ = layers
        for layer in self.layers_.values():
            layer.in_use = False
        self.looks_, self.ranks_, self.change_, self.changed_at_ = 0, {}, None, None

    def on_step_begin(self, args, state, control, optimizer: Any = None, **kwargs):
        if self.changed_at_ is not None:
            return
        progress = self.progress(state)
        if (looks := 1 + math.floor((progress - self.earliest) / self.interval)) > self.looks_:
            self.looks_ = looks
            ranks = {path: stable_rank(whole(layer)) for path, layer in self.layers_.items()}
            # A matrix of zeros had no stable rank: count it as changed.
            changes = [abs(ranks[path] / before - 1) if before else 1.0 for path, before in self.ranks_.items()]
            self.change_ = sum(changes) / len(changes) if changes else None
            self.ranks_ = ranks
        if progress >= self.latest or (self.change_ is not None and self.change_ < self.tolerance):
            self.changed_at_ = progress
            for layer in self.layers_.values():
                use_factors(layer, *factors(whole(layer), layer.left.shape[1]))
                optimizer.state.pop(layer.weight, None)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.changed_at_ is not None:
            for layer in self.layers_.values():
                multiply_out(layer)

    def on_train_end(self, args, state, control, **kwargs):
        for layer in self.layers_.values():
            layer.in_use = False

    def flops_key(self) -> Hashable:
        return self.changed_at_ is not None

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        if scope == "rank":
            return {}
        used = self.layers_ if self.changed_at_ is not None else {}
        return {
            "looks": self.looks_,
            "ranks": self.ranks_,
            "change": self.change_,
            "changed_at": self.changed_at_,
            "factors": {path: {"left": layer.left, "right": layer.right} for path, layer in used.items()},
        }

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if scope == "rank":
            return
        self.looks_, self.ranks_ = state["looks"], dict(state["ranks"])
        self.change_, self.changed_at_ = state["change"], state["changed_at"]
        for path, values in state["factors"].items():
            use_factors(self.layers_[path], values["left"], values["right"])

    def report(self) -> Mapping[str, Any]:
        """Report the progress and the last relative change of stable ranks at the change, and the share of weights."""
        sizes = [(layer.left.numel() + layer.right.numel(), layer.weight.numel()) for layer in self.layers_.values()]
        thin, full = map(sum, zip(*sizes, strict=True))
        return {"changed_at": self.changed_at_, "change": self.change_, "layers": len(sizes), "weights": thin / full}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["changed_at"] is not None
