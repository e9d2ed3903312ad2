"""Multiply in 8-bit integers in the linear layers, forward and backward.

Weights, gradients and the optimizer keep their precision.  For each product x @ y, every row of x and every column of y
is scaled to 127 and rounded.  The integers are multiplied exactly:

    x @ y ~ scale_x * (round(x / scale_x) @ round(y / scale_y)) * scale_y        scale_x = max(abs(row)) / 127

Consumer GPUs do this twice as fast as products in 16 bits.

It converts the linear layers in blocks with sides that are multiples of 16.  Embeddings, heads, and adapters of `LoRA`
keep their precision.  torchao does the work.  Evaluation computes in full precision, as does the saved model, which is
an ordinary one.

Recommendation: Use Int8Training if you train wide models on Ampere or Ada GPUs, with ``torch.compile``.
When to use: Wide models on GPUs with fast integer products (Ampere, Ada), with ``torch.compile``.  Its authors measured
1.7 times the tokens a second for 1B parameters on an RTX 4090, in one run, with a slightly higher loss.
When not to use:
- Without ``torch.compile`` or on CPUs, because scaling and rounding cost more than the products.
- Narrow layers, and GPUs with float8.
- Production: it is a prototype of torchao's.
Defaults: ``grad_weight`` is torchao's default.
Differences from the paper: None.
References: torchao, quantized training,
https://github.com/pytorch/ao/tree/main/torchao/prototype/quantized_training; Xi et al. (2024), Jetfire,
https://arxiv.org/abs/2403.12422.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_accel.surgery.low_precision import UNEQUAL, ContiguousGradient, convertible_layers
from hf_accel.technique import Technique


class Int8Linear(nn.Linear):
    """A linear layer that multiplies in 8-bit integers while it trains."""

    multiply: Callable[..., Tensor]
    """Function of inputs, a weight, a bias and the configuration."""
    config: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):  # torchao computes in the dtype of its input
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = ContiguousGradient.apply(self.multiply(x.contiguous(), self.weight, None, self.config))
        return product if self.bias is None else product + self.bias.to(product.dtype)  # type: ignore[union-attr]


def multiply_in_int8(layer: nn.Linear, *, grad_weight: bool = True) -> None:
    """Let a linear layer multiply in 8-bit integers, in place; with ``grad_weight``, in its weight's gradient, too."""
    try:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision
    except ImportError:
        raise ValueError("torchao is not installed. Install it with: pip install 'hf-accel[quant]'.") from None
    # torchao's own layer gives biases of 16 bits a float32 gradient; its tensors quantize nothing in torchao 0.18.
    converted: Any = layer
    converted.__class__ = Int8Linear
    converted.multiply = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction.apply
    converted.config = Int8MixedPrecisionTrainingConfig(grad_weight=grad_weight)


@dataclass(eq=False)
class Int8Training(Technique):
    """Multiply in 8-bit integers in the linear layers of the blocks, with torchao.

    Args:
        grad_weight: Whether gradients of weights use integers, too; full precision is more exact.
    """

    grad_weight: bool = True
    expected_failed_checks: ClassVar = UNEQUAL
    claims: ClassVar = frozenset({"layer_types"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Convert the layers in place."""
        try:
            layers = convertible_layers(model)
            for layer in layers.values():
                multiply_in_int8(layer, grad_weight=self.grad_weight)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.layers_ = len(layers)
        return model

    def report(self) -> Mapping[str, Any]:
        """Report the number of converted layers."""
        return {"layers": self.layers_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
