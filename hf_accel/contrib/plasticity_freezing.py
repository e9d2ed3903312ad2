"""Stop training the earliest blocks once their outputs on a few examples hardly change.

A frozen block costs its forward pass only.  At each of ``checks`` equal distances, a block's plasticity

    P_l = |S'_l - S_l|^2 / n^2

compares the similarities of its outputs for n examples of the training set with those at the last check.  S_l has the
products of each two outputs, each row of length 1.  From ``start`` on, blocks are frozen from the input upwards once
P_l has twice in a row been below ``threshold`` times its largest value.

Recommendation: Do not use PlasticityFreezing unless you study freezing; its gain was never measured here.
When to use: Fine-tuning of a pretrained encoder over several epochs.  For freezing by the state of the model, authors
report 19 to 43 % less time.  Cached outputs of frozen blocks would save more; they are missing here.
When not to use: Training from scratch.  Models under ``torch.compile``, which compiles again at each change.  DeepSpeed
ZeRO.
Defaults: ``threshold`` is Egeria's.  ``start``, ``max_fraction`` and ``checks`` are those of `GradientNormFreezing`.
Differences from the paper: Egeria compares with a quantized model that runs beside.  Here the reference are the outputs
at the last check, averaged over positions.  No block is trained again.
References: Wang et al. (2022), Egeria, https://arxiv.org/abs/2201.06227.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerState

from hf_accel.batch import StepPlan
from hf_accel.preserve import evaluation_mode, random_state_kept
from hf_accel.stream.indexed import StepStream
from hf_accel.stream.reader import StepReader
from hf_accel.surgery.freezing import BlockFreezing
from hf_accel.technique import Fraction

EXAMPLES = 16
"""Examples of the training set on which plasticity is measured."""


def settled_by_plasticity(plasticity_TL: Sequence[Sequence[float]], depth: int, threshold: float) -> int:
    """Return the number of blocks to freeze, given their plasticity at each check and the number of frozen ones."""
    if len(plasticity_TL) < 2:
        return depth
    plasticity_LT = list(zip(*plasticity_TL, strict=True))
    settled_L = [max(of_block[-2:]) < threshold * max(of_block) for of_block in plasticity_LT]
    return next((i for i in range(depth, len(settled_L)) if not settled_L[i]), len(settled_L))


def similarities(activations_NH: Tensor) -> Tensor:
    """Return the similarities of examples, (N, N), each row of length 1 (Tung & Mori 2019)."""
    return F.normalize(activations_NH @ activations_NH.T)


@dataclass(eq=False)
class PlasticityFreezing(BlockFreezing):
    """Freeze blocks whose outputs have settled; needs no more than a plain Trainer.

    Args:
        start: Progress, in [0, 1), before which no block is frozen.
        max_fraction: Largest share of the blocks, in [0, 1], that is frozen.
        threshold: Share, in [0, 1], of its largest plasticity below which a block has settled.
        checks: Number of checks per run, at least 2.
    """

    threshold: Fraction = 0.2
    checks: Annotated[int, at.Ge(2)] = 20
    decides_by_weights: ClassVar = True
    counters: ClassVar = (*BlockFreezing.counters, "settled", "looks", "plasticity", "reference")
    probe_fields: ClassVar = {"start": 0.25, "threshold": 0.9, "checks": 12}
    variations: ClassVar = {"start": 0.75, "threshold": 0.25}

    def on_train_begin(self, args, state, control, model=None, train_dataloader: Any = None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.settled_, self.looks_ = 0, 0
        self.plasticity_: list[list[float]] = []
        self.reference_: Tensor | None = None
        self.examples_ = self._examples(train_dataloader, args.seed)

    def depth(self, state: TrainerState, model: nn.Module) -> int:
        progress = self.progress(state)
        if (looks := int(progress * self.checks + 1e-9)) > self.looks_:
            self.looks_ = looks
            self._measure(model)
            if progress >= self.start:
                self.settled_ = min(settled_by_plasticity(self.plasticity_, self.settled_, self.threshold), self.most_)
        return self.settled_

    def _measure(self, model: Any) -> None:
        """Measure the plasticity since the last check; the same on every rank."""
        now_LNN = self._similarities(model)
        if self.reference_ is not None:
            self.plasticity_.append((now_LNN - self.reference_).square().mean((1, 2)).tolist())
        self.reference_ = now_LNN

    @torch.no_grad()
    def _similarities(self, model: Any) -> Tensor:
        """Return the similarities of each block's outputs for the examples, (L, N, N), on the CPU."""
        activations: list[list[Tensor]] = [[] for _ in self.blocks_]

        def keep(block, args, output, i):
            hidden = output[0] if isinstance(output, tuple) else output
            activations[i].append(hidden.flatten(0, -2).mean(0).cpu().double())

        hooks = [block.register_forward_hook(functools.partial(keep, i=i)) for i, block in enumerate(self.blocks_)]
        try:
            with random_state_kept(model.device), evaluation_mode(model):
                for inputs in self.examples_:
                    inputs = {name: value.to(model.device) for name, value in inputs.items()}
                    run = functools.partial(model, **inputs)
                    run() if self.run_ is None else self.run_.count(inputs, run, needed=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([similarities(torch.stack(of_block)) for of_block in activations])

    def _examples(self, loader: Any, seed: int) -> list[dict[str, Tensor]]:
        """Return some of the training set, one example a batch, the same on every rank and in a resumed run."""
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) < 2:
            raise ValueError(
                f"{self!r} needs at least two examples of a training set with an index. Use GradientNormFreezing."
            )
        chosen_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(dataset))[:EXAMPLES])
        reader = loader.reader if isinstance(loader, StepStream) else StepReader(dataset, loader.collate_fn)
        return [micro.inputs for micro in reader[StepPlan(0, chosen_N, None, 1, 0, 1, seed)].micro_batches]
