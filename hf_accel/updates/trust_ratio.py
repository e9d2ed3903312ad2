"""Update parameters one by one, some with a layer-wise rate: the divided groups, norms and ratios."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_accel.technique import Technique


class EachParameter(torch.optim.Optimizer):
    """Update one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update all groups once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, self.state[p])
        return loss

    def update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Update one parameter, which has a gradient; ``state`` is empty at first."""
        raise NotImplementedError


def norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of the whole tensor, also if this rank has a shard."""
    length = torch.linalg.vector_norm(tensor)
    return length.full_tensor() if isinstance(length, DTensor) else length


def ratio(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Divide two lengths; return 1 if either is 0, so that weights of zero are updated by the plain rate."""
    both = (weight_norm > 0) & (update_norm > 0)
    return torch.where(both, weight_norm / update_norm, torch.ones_like(weight_norm))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def groups_for(technique: Technique, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide the trainer's groups into decayed parameters, which have a trust ratio, and the others."""
    run: Any = technique.run_
    if run.is_deepspeed_enabled:
        raise ValueError(
            f"{technique!r} does not support DeepSpeed ZeRO because {technique.refused_backends['zero']}. "
            "Use DDP or FSDP."
        )
    parts = divided(groups, set(run.get_decay_parameter_names(model)))
    if not any(part["adapted"] for part in parts):
        raise ValueError(
            f"{technique!r} does not support {type(model).__name__} because only biases and norms are trained. "
            f"Remove {type(technique).__name__}."
        )
    return parts


def divided(groups: list[dict[str, Any]], adapted_names: Collection[str]) -> list[dict[str, Any]]:
    """Split each group in up to two; ``adapted`` says whether the parameters have a trust ratio."""
    parts = []
    for group in groups:
        for adapted in (True, False):
            chosen = [(n in adapted_names) == adapted for n in group["names"]]
            params = [p for p, here in zip(group["params"], chosen, strict=True) if here]
            if params:
                rest = {key: value for key, value in group.items() if key != "names"}
                parts.append(rest | {"params": params, "adapted": adapted})
    return parts
