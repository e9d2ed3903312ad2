"""Multiply in 8-bit floating point in the linear layers, forward and backward.

Weights, gradients and the optimizer keep their precision.  Both factors of each product are scaled to the range of a
float8 format and rounded to it.  The product is accumulated in more bits:

    x @ y ~ (float8(x * scale_x) @ float8(y * scale_y)) / (scale_x * scale_y)        scale_x = 448 / max(abs(x))

``tensorwise`` takes the maximum over a whole matrix, which is fastest.  ``rowwise`` takes it over each row, which is
more exact.  ``rowwise_with_gw_hp`` also keeps the gradient of the weight in high precision, for unstable runs.

It converts the linear layers in blocks with sides that are multiples of 16.  Embeddings, heads, and adapters of `LoRA`
keep their precision.  torchao does the work.  Evaluation computes in full precision, as does the saved model, which is
an ordinary one.

Recommendation: Use Float8Training if you train above about 1B parameters on H100 or later, with ``torch.compile``.
When to use: Pre-training and full fine-tuning of models above some 1B parameters on H100 or later, always with
``torch.compile``.  The authors of torchao report 25 % more tokens a second for 8B parameters (tensorwise), 10 %
(rowwise).
When not to use:
- Small models, which get slower (nanochat: 5 % gained at equal loss at depth 26, a loss at depth 12).
- Without ``torch.compile``, because scaling then makes training several times slower.
Defaults: ``recipe`` is torchao's default.
Differences from the paper: None.
References: Micikevicius et al. (2022), https://arxiv.org/abs/2209.05433; torchao,
https://github.com/pytorch/ao/tree/main/torchao/float8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_accel.surgery.low_precision import UNEQUAL, ContiguousGradient, convertible_layers
from hf_accel.technique import Technique

CAPABILITY = (8, 9)
"""First CUDA capability with float8 matrix products: Ada; Hopper follows."""


@functools.cache
def _plain_in_evaluation(kind: type[nn.Linear]) -> type[nn.Linear]:
    """Return a class of layers that compute in float8 only in training, so evaluation matches the saved model."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if not self.training:
            return nn.Linear.forward(self, x)
        return ContiguousGradient.apply(kind.forward(self, x.contiguous()))  # type: ignore[return-value]

    return type(kind.__name__, (kind,), {"forward": forward})


def multiply_in_float8(model: nn.Module, paths: Mapping[str, Any], *, recipe: Any, emulate: bool = False) -> None:
    """Let the linear layers at these paths multiply in float8; emulation gives the same numbers on any device."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("torchao is not installed. Install it with: pip install 'hf-accel[quant]'.") from None
    # Padded, because the number of tokens is a side of a product, too, and may not be a multiple of 16.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, path: path in paths)
    for path in paths:
        layer: Any = model.get_submodule(path)
        layer.__class__ = _plain_in_evaluation(type(layer))


@dataclass(eq=False)
class Float8Training(Technique):
    """Multiply in 8-bit floating point in the linear layers of the blocks, with torchao.

    Args:
        recipe: Granularity of the scales.
        emulate: Whether to round to float8 and multiply in more bits, on any device, to see the effect on the loss.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    emulate: bool = False
    probe_fields: ClassVar = {"emulate": True}
    expected_failed_checks: ClassVar = UNEQUAL | {
        "check_every_option_matters": "without emulate=True it needs a GPU with float8",
    }
    claims: ClassVar = frozenset({"layer_types"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Convert the layers in place."""
        assert self.run_ is not None
        device = self.run_.args.device
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
        if not able and not self.emulate:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            raise ValueError(
                f"{self!r} does not support {name} because it has no float8 matrix products. "
                "Use Ada, H100 or later, or set emulate=True to see the effect on the loss."
            )
        try:
            layers = convertible_layers(model)
            multiply_in_float8(model, layers, recipe=self.recipe, emulate=self.emulate)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.layers_ = len(layers)
        return model

    def report(self) -> Mapping[str, Any]:
        """Report the number of converted layers, and whether they only emulate float8."""
        return {"layers": self.layers_, "emulated": self.emulate}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
