"""What `Float8Training` and `Int8Training` share: linear layers that multiply in fewer bits while they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.surgery.blocks import linear_layers

SCALES = "the scales of a product depend on the examples in it"
UNEQUAL = {"check_micro_batch_invariant": SCALES} | {
    f"two_ranks_equal_one[{backend}]": SCALES for backend in ("ddp", "fsdp2", "zero2", "zero3")
}
"""Checks of the contract that fail where examples are divided in another way."""

MULTIPLE = 16
"""Of which both sides of a layer's matrix must be multiples, for the hardware."""


def convertible_layers(model: Any) -> dict[str, nn.Linear]:
    """The plain linear layers in blocks by path; of a model with adapters, those that it had before."""
    adapted = hasattr(model, "peft_config")
    layers = {
        path: layer
        for path, layer in linear_layers(model).items()
        if type(layer) is nn.Linear
        and all(side % MULTIPLE == 0 for side in (layer.out_features, layer.in_features))
        and (path.endswith(".base_layer") or not adapted)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no plain nn.Linear in a block, with sides that are multiples of {MULTIPLE}. "
            "Leave it out for this model."
        )
    return layers


class ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient lies in memory as torchao wants it: it takes a view of what may be transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()
