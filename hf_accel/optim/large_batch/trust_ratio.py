"""What layer-wise rates have in common: the norm of a parameter, and which parameters have such a rate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_accel.technique import Technique


def norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm, of the whole where this rank has a shard."""
    length = torch.linalg.vector_norm(tensor)
    return length.full_tensor() if isinstance(length, DTensor) else length


def ratio(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """The quotient of two lengths, or 1 where either is 0: weights of zero are updated by the plain rate."""
    both = (weight_norm > 0) & (update_norm > 0)
    return torch.where(both, weight_norm / update_norm, torch.ones_like(weight_norm))


def local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def groups_for(technique: Technique, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of the trainer divided into what is decayed, which has a trust ratio, and what is not."""
    run: Any = technique.run_
    if run.is_deepspeed_enabled:
        raise ValueError(
            f"{technique!r}: under DeepSpeed ZeRO, parameters have no norms of their own. Use DDP or FSDP."
        )
    parts = divided(groups, set(run.get_decay_parameter_names(model)))
    if not any(part["adapted"] for part in parts):
        raise ValueError(f"{technique!r}: all that is trained are biases and norms. Use another optimizer.")
    return parts


def divided(groups: list[dict[str, Any]], adapted_names: Collection[str]) -> list[dict[str, Any]]:
    """The groups, each in up to two: ``adapted`` says whether its parameters have a trust ratio."""
    parts = []
    for group in groups:
        for adapted in (True, False):
            chosen = [(n in adapted_names) == adapted for n in group["names"]]
            params = [p for p, here in zip(group["params"], chosen, strict=True) if here]
            if params:
                rest = {key: value for key, value in group.items() if key != "names"}
                parts.append(rest | {"params": params, "adapted": adapted})
    return parts
