"""Start with smaller residual branches in deeper models.

The variance of a residual stream grows with every branch that is added to it.  In a stack of N branches (two per block
of a decoder), the last projection of each starts with

    W = N^(-exponent) W_0

for the values W_0 of the architecture.  With an exponent of 1/2, the sum of all branches starts with the variance of
one, at any depth.

Recommendation: Use DepthScaledInit if you pretrain a deep model from random weights and its architecture does not
scale.
When to use: Pre-training of deep models from random weights, without such a rule in the architecture.
When not to use: Pretrained models, and architectures that scale these projections themselves (GPT-2, ModernBERT): it
refuses both.  Networks with batch norm, which remove any scale before the norm.
Defaults: ``exponent`` is GPT-2's.
Differences from the paper: DeepNorm, which also scales the other side of the addition, is missing because
configurations of common architectures have no place for its factor.
References: Radford et al. (2019), Language models are unsupervised multitask learners,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_accel.surgery.blocks import block_lists, residual_projections
from hf_accel.surgery.weight_init import WeightInit
from hf_accel.technique import Fraction


def depth_scales(model: Any, exponent: float) -> dict[str, float]:
    """Return the factor of each residual projection by path: a power of their number in the stack."""
    paths = residual_projections(model)
    stacks = [path for path in block_lists(model) if any(name.startswith(f"{path}.") for name in paths)]
    scales = {}
    for stack in stacks:
        inside = [name for name in paths if name.startswith(f"{stack}.")]
        scales |= {name: len(inside) ** -exponent for name in inside}
    return scales


def scaled_already(model: Any) -> bool:
    """Return whether these projections start smaller than the configuration's ``initializer_range``."""
    usual, layers = getattr(model.config, "initializer_range", None), residual_projections(model)
    weights: list[torch.Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    values = torch.cat([weight.detach().flatten() for weight in weights])
    return usual is not None and bool(values.cpu().double().std() < 0.75 * usual)  # one block, two branches: 0.71


@dataclass(eq=False)
class DepthScaledInit(WeightInit):
    """Start with residual branches that are smaller in deeper models.

    Args:
        exponent: Power, in [0, 1], of the number of branches; last projections are divided by it.
    """

    exponent: Fraction = 0.5
    neutral: ClassVar = {"exponent": 0.0}

    def write(self, model: Any) -> None:
        self.scales_ = depth_scales(model, self.exponent)
        if self.exponent > 0 and scaled_already(model):
            raise ValueError(
                f"{type(model).__name__} starts with smaller residual projections by its own rule. "
                "Remove DepthScaledInit."
            )
        with torch.no_grad():
            for path, scale in self.scales_.items():
                model.get_submodule(path).weight.mul_(scale)

    def report(self) -> Mapping[str, Any]:
        """Report the number of scaled projections, and the smallest factor."""
        return {"branches": len(self.scales_), "scale": min(self.scales_.values())}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["scale"] < 1
