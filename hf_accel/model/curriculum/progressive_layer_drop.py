"""Skip some blocks in each step, more of them deeper in the model and later in training.

A step at progress p keeps block l of the L blocks of a stack (0 is the first) with the probability

    theta(p) = (1 - keep) * exp(-decay * p) + keep        q_l = 1 - l / L * (1 - theta(p))

A skipped block is not called: it costs no operation, and its parameters do not learn in this step.  The change that
other blocks make to the hidden states x is scaled,

    x + (block(x) - x) / q_l

so in expectation a stack adds as much as in evaluation, which calls all blocks unscaled.  At the end, (keep + 1) / 2 of
the blocks are called, up to rounding.  The first block of a stack is always kept, and so is at least one that trains.
The draws depend on the seed and the step, and are the same for all examples, micro-batches and ranks.

Recommendation: Use ProgressiveLayerDrop if you pretrain a deep pre-norm transformer and compare at equal time.
When to use: Pretraining of deep pre-norm transformers; the authors report 24 % less time for a sample of BERT.
When not to use:
- Where the same time of plain training does as well: under fixed budgets with a decayed learning rate, others found no
  gain (https://arxiv.org/abs/2307.06440).
- Models of few blocks, models with several towers, and compiled models.
- Norms after the addition (BERT), where the scaled term is a difference of normed vectors.
Defaults: ``keep`` and ``decay`` are the authors'.
Differences from the paper: None.
References: Zhang & He (2020), progressive layer dropping, https://arxiv.org/abs/2010.13369; Fan et al. (2019),
LayerDrop, https://arxiv.org/abs/1909.11556.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
from torch import nn

from hf_accel.adapters import unwrapped
from hf_accel.surgery.block_wrapper import (
    hidden_states,
    refuse_other_shape,
    refuse_waiting_ddp,
    refuse_zero,
    wrap_block,
)
from hf_accel.surgery.blocks import block_stacks
from hf_accel.technique import Positive, Technique


def keep_probabilities(progress: float, num_blocks: int, *, keep: float, decay: float) -> np.ndarray:
    """Return the probability that each block of a stack is kept."""
    theta = (1 - keep) * math.exp(-decay * progress) + keep
    return 1 - np.arange(num_blocks) / num_blocks * (1 - theta)


@dataclass(eq=False)
class ProgressiveLayerDrop(Technique):
    """Skip blocks of a model in steps; needs no more than a plain Trainer.

    Args:
        keep: Limit of theta, in (0, 1]; the probability of the deepest block is slightly higher.
        decay: Speed with which theta falls, above 0: at progress 1 / decay it has fallen by 63 % of the way.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
    decay: Positive = 100.0
    neutral: ClassVar = {"keep": 1.0}
    expected_failed_checks: ClassVar = {
        "check_reentrant_checkpointing": "it adds the gradients of a block's examples in another order: losses differ "
        "in the last digit"
    }
    probe_fields: ClassVar = {"decay": 10.0}
    refused_backends: ClassVar = {"zero": "skipped weights keep moving in its flat partitions"}
    counters: ClassVar = ("counts",)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_zero(self, args)
        if args.torch_compile:
            raise ValueError(
                f"{self!r} does not support torch_compile because every choice of blocks would be compiled again. "
                "Set torch_compile=False."
            )
        refuse_waiting_ddp(self, args, model)
        base = unwrapped(model)
        try:
            self.stacks_ = block_stacks(base)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        if all(len(blocks) == 1 for blocks in self.stacks_):
            raise ValueError(
                f"{self!r} needs more than one block, because the first is always kept; {type(base).__name__} has one. "
                "Remove ProgressiveLayerDrop."
            )
        self.dropped_: set[nn.Module] = set()
        self.scale_: dict[nn.Module, float] = {}
        self.counts_ = {"dropped": 0, "all": 0}
        self.drawn_ = False
        self.beside_: dict[int, tuple | None] = {}
        self.ends_ = [
            wrap_block(block, functools.partial(self._call, stack, block))
            for stack, blocks in enumerate(self.stacks_)
            for block in blocks
        ]

    def on_step_begin(self, args, state, control, **kwargs):
        generator = np.random.default_rng((args.seed, state.global_step))
        self.scale_, self.dropped_ = {}, set()
        for blocks in self.stacks_:
            kept = keep_probabilities(self.progress(state), len(blocks), keep=self.keep, decay=self.decay)
            self.scale_ |= dict(zip(blocks, kept.tolist(), strict=True))
            self.dropped_ |= {b for b, q, u in zip(blocks, kept, generator.random(len(blocks)), strict=True) if u >= q}
        self.drawn_ = True

    def _keep_a_trained_one(self) -> None:
        """Keep a block that learns in every step, once other techniques have frozen theirs."""
        self.drawn_ = False
        trained = [block for block in self.scale_ if any(p.requires_grad for p in block.parameters())]
        if trained and self.dropped_.issuperset(trained):
            self.dropped_.remove(trained[0])

    def on_step_end(self, args, state, control, **kwargs):
        self.counts_["dropped"] += len(self.dropped_)
        self.counts_["all"] += len(self.scale_)
        self.dropped_, self.scale_ = set(), {}
        self.beside_.clear()

    def on_train_end(self, args, state, control, **kwargs):
        for end in self.ends_:
            end()

    def _call(self, stack: int, block: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if block not in self.scale_ or not (block.training and torch.is_grad_enabled()):
            return call(*args, **kwargs)
        if self.drawn_:
            self._keep_a_trained_one()
        x, kept = hidden_states(block, args, kwargs), self.scale_[block]
        if block in self.dropped_:
            beside = self.beside_[stack]  # for example position biases, which T5's blocks pass on
            return x if beside is None else (x, *beside)
        output = call(*args, **kwargs)
        new, beside = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        refuse_other_shape(self, x, new)
        self.beside_[stack] = beside
        if kept < 1:
            new = x + (new - x) / kept
        return new if beside is None else (new, *beside)

    def flops_key(self) -> Hashable:
        """Count the skipped blocks by their numbers of parameters and of trainable ones."""
        return tuple(sorted(Counter(map(_size, self.dropped_)).items()))

    def report(self) -> Mapping[str, Any]:
        """Report the share of skipped blocks over all steps."""
        return {"dropped": self.counts_["dropped"] / max(self.counts_["all"], 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["dropped"] > 0


def _size(block: nn.Module) -> tuple[int, int]:
    parameters = list(block.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
