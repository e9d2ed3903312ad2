"""Zero initialization of residual branches: at first, every block hands on what it is given.

A residual block computes x + F(x).  With the last layer of F at zero, in each block l of L,

    F_l(x) = W_l h_l(x) + b_l        W_l = 0,  b_l = 0

the network begins as its embeddings and its head, with gradients that are those of a shallow network at any depth, and
blocks come in as they learn something.  The last layer is the output projection of each attention and of each MLP, as
`hf_accel.surgery.blocks.residual_projections` finds them; in networks with batch norm it is the last norm of a block,
whose scale becomes zero.  Where a norm follows the addition (BERT), a block begins as that norm.

Reference: Goyal et al. (2017), https://arxiv.org/abs/1706.02677, section 5.1 (scales of batch norms); Zhang et al.
(2019), Fixup, https://arxiv.org/abs/1901.09321; for language models, the records of modded-nanogpt,
https://github.com/KellerJordan/modded-nanogpt, of which it is one part.

When to use: pre-training of deep networks whose norms come first, from random weights.
When not to use: pretrained models, which it refuses; optimizers that scale steps by the norm of the weights (`LAMB`,
`LARS`), which is zero here.  The encoder of an encoder-decoder model begins to learn a step later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.model.initialization.weight_init import WeightInit
from hf_accel.surgery.blocks import residual_projections


@torch.no_grad()
def zero_residuals(model: Any) -> int:
    """Make the last layer of each residual branch zero, and say how many there are."""
    layers = residual_projections(model)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.zero_()
    return len(layers)


@dataclass(eq=False)
class ZeroInitResidual(WeightInit):
    """Starts with residual branches that add nothing."""

    def write(self, model: Any) -> None:
        self.branches_ = zero_residuals(model)

    def report(self) -> Mapping[str, Any]:
        """Residual branches that began at zero."""
        return {"branches": self.branches_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["branches"] > 0
