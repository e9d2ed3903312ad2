"""Start with residual branches that add nothing, so every block passes its input through.

A residual block computes x + F(x).  With the last layer of F at zero, in each block l of L,

    F_l(x) = W_l h_l(x) + b_l        W_l = 0,  b_l = 0

the network starts as its embeddings and its head.  Its gradients are those of a shallow network at any depth, and
blocks contribute as they learn.  The last layer is the output projection of each attention and of each MLP
(`hf_accel.surgery.blocks.residual_projections`).  In networks with batch norm it is the last norm of a block, and its
scale becomes zero.  If a norm follows the addition (BERT), a block starts as that norm.

Recommendation: Use ZeroInitResidual if you pretrain a deep pre-norm network from random weights.
When to use: Pre-training of deep networks with norms before branches, from random weights.
When not to use: Pretrained models, which it refuses.  Optimizers that scale steps by the norm of the weights (`LAMB`,
`LARS`), because it is zero here.  The encoder of an encoder-decoder model starts to learn one step later.
Differences from the paper: None.
References: Goyal et al. (2017), https://arxiv.org/abs/1706.02677, section 5.1 (scales of batch norms); Zhang et al.
(2019), Fixup, https://arxiv.org/abs/1901.09321; for language models, the records of modded-nanogpt, with this as one
part, https://github.com/KellerJordan/modded-nanogpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.surgery.blocks import residual_projections
from hf_accel.surgery.weight_init import WeightInit


@torch.no_grad()
def zero_residuals(model: Any) -> int:
    """Make the last layer of each residual branch zero, and return their number."""
    layers = residual_projections(model)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.zero_()
    return len(layers)


@dataclass(eq=False)
class ZeroInitResidual(WeightInit):
    """Start with residual branches that add nothing."""

    def write(self, model: Any) -> None:
        self.branches_ = zero_residuals(model)

    def report(self) -> Mapping[str, Any]:
        """Report the number of residual branches that started at zero."""
        return {"branches": self.branches_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["branches"] > 0
