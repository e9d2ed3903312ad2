"""Find linear layers that can multiply in fewer bits while they train, for `Float8Training` and `Int8Training`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.adapters import is_adapted
from hf_accel.surgery.blocks import linear_layers

SCALES = "the scales of a product depend on the examples in it"
UNEQUAL = {"check_micro_batch_invariant": SCALES} | {
    f"two_ranks_equal_one[{backend}]": SCALES for backend in ("ddp", "fsdp2", "zero2", "zero3")
}
"""Checks of the contract that fail when examples are divided differently, with the reason."""

MULTIPLE = 16
"""Divisor of both sides of a layer's matrix, for the hardware."""


def convertible_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the plain linear layers in blocks by path, without those of adapters."""
    adapted = is_adapted(model)
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
            "Remove the technique for this model."
        )
    return layers


class ContiguousGradient(torch.autograd.Function):
    """Pass values through, and make their gradient contiguous: torchao takes views of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()
