"""Float8 training: the matrix products of linear layers in 8-bit floating point, forward and backward.

Weights, gradients and the optimizer stay as they are.  Both factors of each product are scaled to the range of a float8
format and rounded to it, and the product is accumulated in more bits,

    x @ y ~ (float8(x * scale_x) @ float8(y * scale_y)) / (scale_x * scale_y)        scale_x = 448 / max(abs(x))

``tensorwise`` takes the maximum over a whole matrix, which is fastest; ``rowwise`` over each row, more exact;
``rowwise_with_gw_hp`` leaves the gradient of the weight in high precision besides, for runs that are unstable.  It
holds for the linear layers in blocks with sides that are multiples of 16; embeddings, heads, and adapters of `LoRA`
stay as they are.  torchao does the work.  Evaluations compute in full precision, as the saved model does, which is an
ordinary one.

Reference: Micikevicius et al. (2022), https://arxiv.org/abs/2209.05433; torchao,
https://github.com/pytorch/ao/tree/main/torchao/float8.

When to use: pre-training and full fine-tuning of models above some 1B parameters on H100 or later, always with
``torch.compile``: torchao reports 25 % more tokens a second for 8B parameters (tensorwise), 10 % (rowwise).
When not to use: small models, which get slower (nanochat: 5 % gained at equal loss at depth 26, a loss at depth 12);
without ``torch.compile``, where scaling makes it several times slower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_accel.model.compression.low_precision import UNEQUAL, ContiguousGradient, convertible_layers
from hf_accel.technique import Technique

CAPABILITY = (8, 9)
"""The first CUDA devices whose matrix products take float8: Ada; then Hopper."""


@functools.cache
def _plain_in_evaluation(kind: type[nn.Linear]) -> type[nn.Linear]:
    """A class of layers that compute in float8 only while they train: evaluations show what a saved model does."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if not self.training:
            return nn.Linear.forward(self, x)
        return ContiguousGradient.apply(kind.forward(self, x.contiguous()))  # type: ignore[return-value]

    return type(kind.__name__, (kind,), {"forward": forward})


def multiply_in_float8(model: nn.Module, paths: Mapping[str, Any], *, recipe: Any, emulate: bool = False) -> None:
    """Let the linear layers at these paths multiply in float8; emulated, they give the same numbers on any device."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("torchao: is not installed. Install it with: pip install 'hf-accel[quant]'.") from None
    # Padded, for the number of tokens is a side of a product, too, and need not be a multiple of 16.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, path: path in paths)
    for path in paths:
        layer: Any = model.get_submodule(path)
        layer.__class__ = _plain_in_evaluation(type(layer))


@dataclass(eq=False)
class Float8Training(Technique):
    """Multiplies in 8-bit floating point in the linear layers of the blocks, with torchao.

    Args:
        recipe: Over what the scales are taken.
        emulate: Round to float8 and multiply in more bits, on any device: the effect on the loss, not on time.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"  # torchao
    emulate: bool = False
    probe_fields: ClassVar = {"emulate": True}
    expected_failed_checks: ClassVar = UNEQUAL | {
        "check_every_option_matters": "without emulate=True it takes a GPU that has float8",
    }
    claims: ClassVar = frozenset({"layer_types"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The same layers, which multiply in another way."""
        assert self.run_ is not None
        device = self.run_.args.device
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
        if not able and not self.emulate:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            raise ValueError(
                f"{self!r}: {name} has no products of matrices in float8. "
                "Use a GPU that has (H100 or later, Ada), drop it, or set emulate=True to see its effect on the loss."
            )
        try:
            layers = convertible_layers(model)
            multiply_in_float8(model, layers, recipe=self.recipe, emulate=self.emulate)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.layers_ = len(layers)
        return model

    def report(self) -> Mapping[str, Any]:
        """How many layers multiply in float8, and whether they only pretend to."""
        return {"layers": self.layers_, "emulated": self.emulate}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
