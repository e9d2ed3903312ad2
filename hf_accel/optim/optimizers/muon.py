"""Muon: orthogonal updates for the weight matrices of the blocks, AdamW for the rest.

The momentum of a weight matrix is dominated by a few directions.  Muon gives all of them the same length, and so learns
the rare ones as fast; with matrices M, gradient G and weights W of shape (out, in),

    M = momentum * M + (1 - momentum) * G
    U = NewtonSchulz5((1 - momentum) * G + momentum * M)           all singular values near 1
    W = (1 - lr * weight_decay) * W - lr * sqrt(max(1, out / in)) * U

It takes up to 1.4 times fewer steps than well-tuned AdamW at 0.1B parameters, 1.1 times at 1.2B.  Embeddings, output
heads, norms, biases and all else that is no matrix inside a block have AdamW with the trainer's learning rate; the
schedule multiplies both rates.

Reference: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/; Liu et al. (2025), Muon is scalable for LLM
training, https://arxiv.org/abs/2502.16982; the numbers: Wen et al. (2025), https://arxiv.org/abs/2509.02046.  The
iteration is that of ``torch.optim.Muon``; it runs in bfloat16, so gradients that differ in the last digit may give
updates that differ in the third.

When to use: pre-training of transformers.  Tune both ``lr`` and the trainer's learning rate.
When not to use: full fine-tuning of models that were pre-trained with Adam, which it degrades
(https://arxiv.org/abs/2605.10468); convolutional networks; small models or steps, where the iteration costs 10 to 40 %
more time.  Matrices stacked in one parameter are treated as one (attention of GPT-2) or left to AdamW (experts in three
dimensions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_accel.technique import Positive, Technique


def matrix_names(model: Any) -> set[str]:
    """Names of the parameters that Muon updates: matrices in repeated blocks, without embeddings and heads."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)  # others wrap one
    for layer in () if base is None else (base.get_input_embeddings(), base.get_output_embeddings()):
        outside |= {id(p) for p in layer.parameters()} if layer is not None else set()
    inside = {id(p) for m in blocks for p in m.parameters()}
    return {n for n, p in model.named_parameters() if p.dim() == 2 and id(p) in inside and id(p) not in outside}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups whose ``algorithm`` is ``"muon"``, AdamW for those with ``"adamw"``.

    One optimizer with an ordinary state: `torch.optim.Muon` and `torch.optim.AdamW` work on its own groups and state.
    """

    algorithms: ClassVar = {"muon": torch.optim.Muon, "adamw": torch.optim.AdamW}

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Let the algorithms work on the groups and the state as they are now; groups get their default options."""
        self._inner = []
        for name, algorithm in self.algorithms.items():
            if groups := [group for group in self.param_groups if group["algorithm"] == name]:
                inner = algorithm(groups)
                inner.state = self.state
                self._inner.append(inner)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss


@dataclass(eq=False)
class Muon(Technique):
    """Trains the matrices of the blocks with Muon and everything else with AdamW.

    Args:
        lr: Peak learning rate of the matrices, above 0; that of the rest is ``args.learning_rate``.
        momentum: Decay of the momentum per step, in [0, 1).
    """

    lr: Positive = 0.02  # Jordan's, for updates scaled by sqrt(max(1, out / in))
    momentum: Annotated[float, at.Interval(ge=0, lt=1)] = 0.95  # Jordan's
    refused_backends: ClassVar = {"zero": "it flattens parameters, and Muon needs matrices"}
    expected_failed_checks: ClassVar = {
        "two_ranks_equal_one[fsdp2]": "torch iterates in bfloat16, where sums over shards round differently: ranks "
        "stay in step and resume bit for bit, but equal one process to about two digits"
    }

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Each group in two; weight decay and factors on the learning rate hold for both."""
        host: Any = self.host_
        if host.is_deepspeed_enabled:
            raise ValueError(f"{self!r}: under DeepSpeed ZeRO, parameters are no matrices. Use DDP or FSDP.")
        args, matrices = host.args, matrix_names(model)
        muon = {"algorithm": "muon", "momentum": self.momentum}
        adamw = {"algorithm": "adamw", "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        split = []
        for group in groups:
            for options, is_muon in ((muon, True), (adamw, False)):
                chosen = [p for n, p in zip(group["names"], group["params"], strict=True) if (n in matrices) == is_muon]
                lr = group["lr"] * self.lr / args.learning_rate if is_muon else group["lr"]
                if chosen:
                    kept = {key: value for key, value in group.items() if key != "names"}
                    split.append(kept | options | {"params": chosen, "lr": lr})
        count = {
            name: sum(p.numel() for group in split if group["algorithm"] == name for p in group["params"])
            for name in MuonAdamW.algorithms
        }
        if count["muon"] == 0:
            raise ValueError(
                f"{self!r}: {type(model).__name__} has no trainable matrix in a block. Use another optimizer."
            )
        self.share_ = count["muon"] / sum(count.values())
        return MuonAdamW(split)

    def report(self) -> Mapping[str, Any]:
        """The share of the trainable parameters that Muon updates."""
        return {"muon_share": self.share_}
