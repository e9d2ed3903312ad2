"""Depth-scaled initialization: the more branches add to a residual stream, the less each adds at first.

The variance of a residual stream grows with every branch that is added to it.  In a stack of N branches (two for each
block of a decoder), the last projection of each begins with

    W = N^(-exponent) W_0

for the values W_0 that the architecture gives it.  With an exponent of 1/2, the sum of all branches begins with the
variance of one, at any depth.

Reference: Radford et al. (2019), Language models are unsupervised multitask learners,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, section 2.3.
Departure: DeepNorm, which scales the other side of the addition too, is left out, for its factor has no place in the
configurations of common architectures.

When to use: pre-training of deep models from random weights, whose architecture has no such rule.
When not to use: pretrained models, and architectures that scale these projections themselves (GPT-2, ModernBERT), both
of which it refuses; networks with batch norm, which see no scale before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_accel.model.initialization.weight_init import WeightInit
from hf_accel.surgery.blocks import block_lists, residual_projections
from hf_accel.technique import Fraction


def depth_scales(model: Any, exponent: float) -> dict[str, float]:
    """The factor of each residual projection, by path: a power of the number of them in its stack of blocks."""
    paths = residual_projections(model)
    stacks = [path for path in block_lists(model) if any(name.startswith(f"{path}.") for name in paths)]
    scales = {}
    for stack in stacks:
        inside = [name for name in paths if name.startswith(f"{stack}.")]
        scales |= {name: len(inside) ** -exponent for name in inside}
    return scales


def scaled_already(model: Any) -> bool:
    """Whether these projections begin smaller than the configuration's ``initializer_range`` says of all layers."""
    usual, layers = getattr(model.config, "initializer_range", None), residual_projections(model)
    weights: list[torch.Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    values = torch.cat([weight.detach().flatten() for weight in weights])
    return usual is not None and bool(values.cpu().double().std() < 0.75 * usual)  # one block, two branches: 0.71


@dataclass(eq=False)
class DepthScaledInit(WeightInit):
    """Starts with residual branches that are smaller in deeper models.

    Args:
        exponent: Power, in [0, 1], of the number of branches by which their last projections are divided.
    """

    exponent: Fraction = 0.5  # GPT-2
    neutral: ClassVar = {"exponent": 0.0}

    def write(self, model: Any) -> None:
        self.scales_ = depth_scales(model, self.exponent)
        if self.exponent > 0 and scaled_already(model):
            raise ValueError(
                f"{type(model).__name__} begins with smaller residual projections already, by its own rule. Leave it "
                "out."
            )
        with torch.no_grad():
            for path, scale in self.scales_.items():
                model.get_submodule(path).weight.mul_(scale)

    def report(self) -> Mapping[str, Any]:
        """Projections that were scaled, and the smallest factor."""
        return {"branches": len(self.scales_), "scale": min(self.scales_.values())}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["scale"] < 1
