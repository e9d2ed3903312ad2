"""Int8 training: the matrix products of linear layers in 8-bit integers, forward and backward.

Weights, gradients and the optimizer stay as they are.  For each product x @ y, every row of x and every column of y is
scaled to 127 and rounded, and the integers are multiplied exactly,

    x @ y ~ scale_x * (round(x / scale_x) @ round(y / scale_y)) * scale_y        scale_x = max(abs(row)) / 127

which consumer GPUs do twice as fast as products in 16 bits.  It holds for the linear layers in blocks with sides that
are multiples of 16; embeddings, heads, and adapters of `LoRA` stay as they are.  torchao does the work.  Evaluations
compute in full precision, as the saved model does, which is an ordinary one.

Reference: torchao, quantized training,
https://github.com/pytorch/ao/tree/main/torchao/prototype/quantized_training; Xi et al. (2024), Jetfire,
https://arxiv.org/abs/2403.12422.

When to use: wide models on GPUs with fast integer products (Ampere, Ada), with ``torch.compile``: its authors measured
1.7 times the tokens a second for 1B parameters on an RTX 4090, in one run, with a slightly higher loss.
When not to use: without ``torch.compile`` or on CPUs, where scaling and rounding cost more than the products; narrow
layers; GPUs with float8.  It is a prototype of torchao's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_accel.model.compression.low_precision import UNEQUAL, ContiguousGradient, convertible_layers
from hf_accel.technique import Technique


class Int8Linear(nn.Linear):
    """A linear layer that multiplies in 8-bit integers while it trains."""

    multiply: Callable[..., Tensor]
    """Of inputs, a weight, a bias and what is made of integers."""
    config: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):  # torchao computes in the dtype of what it is given
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = ContiguousGradient.apply(self.multiply(x.contiguous(), self.weight, None, self.config))
        return product if self.bias is None else product + self.bias.to(product.dtype)  # type: ignore[union-attr]


def multiply_in_int8(layer: nn.Linear, *, grad_weight: bool = True) -> None:
    """Let a linear layer, in place, multiply in 8-bit integers; the gradient of its weight only if asked for."""
    try:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision
    except ImportError:
        raise ValueError("torchao: is not installed. Install it with: pip install 'hf-accel[quant]'.") from None
    # Its layer adds a bias in float32, whose gradient is none of 16 bits; its tensors quantize nothing in torchao 0.18.
    converted: Any = layer
    converted.__class__ = Int8Linear
    converted.multiply = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction.apply
    converted.config = Int8MixedPrecisionTrainingConfig(grad_weight=grad_weight)


@dataclass(eq=False)
class Int8Training(Technique):
    """Multiplies in 8-bit integers in the linear layers of the blocks, with torchao.

    Args:
        grad_weight: Whether gradients of weights are made of integers, too; in full precision they are more exact.
    """

    grad_weight: bool = True  # torchao
    expected_failed_checks: ClassVar = UNEQUAL
    claims: ClassVar = frozenset({"layer_types"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The same layers, which multiply in another way."""
        try:
            layers = convertible_layers(model)
            for layer in layers.values():
                multiply_in_int8(layer, grad_weight=self.grad_weight)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.layers_ = len(layers)
        return model

    def report(self) -> Mapping[str, Any]:
        """How many layers multiply in integers."""
        return {"layers": self.layers_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
