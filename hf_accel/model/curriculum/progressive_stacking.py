"""Train few blocks first, and grow the model to its full depth by copies of them.

The model is made with all L blocks.  Training starts with the first d_0 = round(start * L) of them.  At the progress
until * k / stages, for k = 1 ... stages, there are

    d_k = d_0 + round(k (L - d_0) / stages)

blocks.  Each new block copies an earlier one, with its weights and its optimizer state
(`hf_accel.surgery.depth_growth`):

    stacked        the whole stack repeated: G_stack, StackingBERT; with several stages gradual stacking
    middle         the middle of the stack twice, at most twice the depth at a time: MIDAS
    interleaved    each block followed by its copies
    on_top         copies of the last block

Blocks that do not exist yet cost their weights only: no operations, gradients or optimizer states.  The configuration
names the current depth, so every checkpoint loads with ``from_pretrained``, which ignores deeper blocks.

A ``silent`` copy starts with zeros in the last projections of its branches and without optimizer state.  It leaves the
outputs unchanged if norms come before branches (not in BERT).  At first, only the gradients of these projections are
above zero.

The moments of a copy are those of its source.  Adam's means of gradients follow the deeper model within 1 / (1 - beta)
steps.  With fresh moments, the first steps would be those of signs.

Recommendation: Use ProgressiveStacking if you pretrain a deep transformer from random weights.
When to use: Pretraining of deep transformers.  G_stack reports a 7B model at the loss of one from scratch with 54.6 %
fewer tokens.  With four blocks in all, a start with half of them was better for few steps.
When not to use: Pretrained models, because it would cut them.  Models of few blocks.  A learning rate that decays
early.
Defaults: ``operator`` is the best of G_stack's comparison.  ``start`` and ``stages`` grow once to four times the depth,
as in G_stack, whose plain copies trained better than ``silent`` ones.  ``until`` lies where a linear decay is still
above half of its peak.
Differences from the paper: Growth comes at shares of the budget, not at counts of tokens, inside one run and under one
schedule.  It is refused once the learning rate is below half of its peak.
References: Du et al. (2024), G_stack, https://arxiv.org/abs/2405.15319; Gong et al. (2019), StackingBERT,
https://proceedings.mlr.press/v97/gong19a.html; Saunshi et al. (2024), MIDAS, https://arxiv.org/abs/2409.19044.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import numpy as np
import torch
from torch import Tensor, nn

from hf_accel.adapters import is_adapted, unwrapped
from hf_accel.surgery.block_wrapper import refuse_waiting_ddp, refuse_zero
from hf_accel.surgery.blocks import residual_projections
from hf_accel.surgery.depth_growth import (
    block_path,
    interleaved,
    makeup,
    middle,
    on_top,
    repeats,
    stacked,
    zero_residual_branches,
)
from hf_accel.technique import Technique

OPERATORS = {"stacked": stacked, "middle": middle, "interleaved": interleaved, "on_top": on_top}


def depths(num_blocks: int, *, start: float, stages: int) -> list[int]:
    """Return the number of blocks before the first growth and after each; the last is ``num_blocks``."""
    first = max(round(start * num_blocks), 1)
    return [first + round(k * (num_blocks - first) / stages) for k in range(stages + 1)]


@torch.no_grad()
def copy_blocks(blocks: Sequence[nn.Module], sources: Sequence[int], optimizer: torch.optim.Optimizer) -> None:
    """Make each block a copy of its current source, in weights, buffers and optimizer state."""
    tensors = [dict(itertools.chain(block.named_parameters(), block.named_buffers())) for block in blocks]
    moved = [(i, source) for i, source in enumerate(sources) if i != source]
    before: dict[int, dict[str, tuple[Tensor, Any]]] = {
        source: {
            name: (tensor.clone(), copy.deepcopy(optimizer.state.get(tensor)))
            for name, tensor in tensors[source].items()
        }
        for source in {source for _, source in moved}
    }
    for i, source in moved:
        for name, tensor in tensors[i].items():
            values, state = before[source][name]
            tensor.copy_(values)
            optimizer.state.pop(tensor, None)
            if state is not None:
                optimizer.state[tensor] = copy.deepcopy(state)


class Shallow(nn.ModuleList):
    """List of modules that shows the first ``shown`` of them, and has the parameters of all."""

    shown: int

    def __len__(self) -> int:
        return self.shown

    def __iter__(self):
        return itertools.islice(self._modules.values(), self.shown)

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


@dataclass(eq=False)
class ProgressiveStacking(Technique):
    """Grow a model during training; needs no more than a plain Trainer.

    Args:
        operator: Choice of the block that each new block copies.
        start: Share of the blocks, in (0, 1], in the first step; at least one block.
        stages: Number of growths, at least 1.
        until: Progress, in (0, 1), of the last growth.
        silent: Whether copies leave the model's function unchanged.
    """

    operator: Literal["stacked", "middle", "interleaved", "on_top"] = "stacked"
    start: Annotated[float, at.Interval(gt=0, le=1)] = 0.25
    stages: Annotated[int, at.Ge(1)] = 1
    until: Annotated[float, at.Interval(gt=0, lt=1)] = 0.3
    silent: bool = False
    neutral: ClassVar = {"start": 1.0}
    probe_fields: ClassVar = {"start": 0.5}
    variations: ClassVar = {"start": 0.25, "operator": "interleaved"}
    refused_backends: ClassVar = {"zero": "its flat partitions hold weights and moments, so no block can be copied"}
    counters: ClassVar = ("depth", "called", "steps")
    claims: ClassVar = frozenset(
        {"block_positions", "early_weights", "frozen_blocks", "initial_blocks", "synchronization", "weight_matrices"}
    )

    def on_train_begin(self, args, state, control, model: Any = None, lr_scheduler: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_zero(self, args)
        refuse_waiting_ddp(self, args, model)
        self.model_ = unwrapped(model)
        try:
            self.blocks_: Any = self.model_.get_submodule(block_path(self.model_))
            self._refuse_what_would_be_lost(args, state)
            self.depths_ = self._checked_depths()
            if self.silent:
                residual_projections(self.model_)  # raises before the first step
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self._refuse_late_growth(_factor(self.run_, lr_scheduler, state.max_steps))
        self.kinds_ = getattr(self.model_.config, "layer_types", None)
        self.called_ = self.steps_ = 0
        self.depth_ = self._depth_at(self.progress(state))

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Hide blocks, once other techniques have looked at all of them."""
        if self.depth_ < len(self.blocks_) and not isinstance(self.blocks_, Shallow):
            self.blocks_.__class__ = Shallow
            self._show(self.depth_)

    def _refuse_what_would_be_lost(self, args: Any, state: Any) -> None:
        """Raise ValueError if the model, the arguments or another technique do not support growth."""
        model, blocks = self.model_, list(self.blocks_)
        if getattr(model.config, "num_hidden_layers", None) != len(blocks):
            raise ValueError(
                f"{type(model).__name__} has no num_hidden_layers in its configuration. Remove ProgressiveStacking."
            )
        if is_adapted(model):
            raise ValueError(
                "adapters need a trained model, and this one grows from random weights. Remove one of the two."
            )
        if (name := getattr(model, "name_or_path", "")) and state.global_step == 0:
            raise ValueError(f"most blocks of the model from {name!r} would be lost. Remove ProgressiveStacking.")
        if args.load_best_model_at_end:
            raise ValueError("the best checkpoint may have fewer blocks. Set load_best_model_at_end=False.")
        if len({id(p) for block in blocks for p in block.parameters()}) < sum(len([*b.parameters()]) for b in blocks):
            raise ValueError(
                f"blocks of {type(model).__name__} share parameters and cannot be copied. Remove ProgressiveStacking."
            )
        average = None if self.run_ is None else self.run_.owner("averaging")
        if average is not None and getattr(average, "start", 0.0) < self.until:
            raise ValueError(f"{average!r} averages weights from before the last growth. Remove one of the two.")

    def _checked_depths(self) -> list[int]:
        """Return the depths; ValueError if the operator cannot make them from these blocks."""
        blocks: list[nn.Module] = list(self.blocks_)
        found = depths(len(blocks), start=self.start, stages=self.stages)
        if found[0] == len(blocks) and self.start < 1:
            raise ValueError(
                f"start={self.start:g} covers all {len(blocks)} blocks, so none is left to add. Lower start."
            )
        for depth, new_depth in itertools.pairwise(found):
            if self.operator == "middle" and new_depth > 2 * depth:
                raise ValueError(
                    f"operator='middle' makes at most {2 * depth} blocks from {depth}, and {new_depth} come next. "
                    "Raise start or stages."
                )
            for i, source in enumerate(OPERATORS[self.operator](depth, new_depth)):
                if makeup(blocks[i]) != makeup(blocks[source]):
                    raise ValueError(
                        f"block {i} of {type(self.model_).__name__} would copy block {source}, which differs in kind. "
                        "Choose another operator, or depths that are multiples of the pattern of its blocks."
                    )
        return found

    def _refuse_late_growth(self, factor: Callable[[float], float] | None) -> None:
        """Raise ValueError if the last growth falls into the decay of the learning rate."""
        if factor is None or self.depths_[0] == self.depths_[-1]:
            return
        now, peak = factor(self.until), max(map(factor, np.linspace(0, self.until, 101)))
        if now < 0.5 * peak:
            raise ValueError(
                f"{self!r}: at progress {self.until:g} the learning rate is down to {now / peak:.0%} of its peak, so "
                "new blocks would hardly train. Lower until, or let the learning rate decay later."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps_ += 1
        self.called_ += self.depth_

    def on_step_end(self, args, state, control, optimizer: Any = None, **kwargs):
        for new_depth in self.depths_:
            if self.depth_ < new_depth <= self._depth_at(self.progress(state)):
                self._grow(new_depth, getattr(optimizer, "optimizer", optimizer))

    def _depth_at(self, progress: float) -> int:
        return self.depths_[min(int(progress * self.stages / self.until + 1e-9), self.stages)]

    def _grow(self, new_depth: int, optimizer: torch.optim.Optimizer) -> None:
        sources = OPERATORS[self.operator](self.depth_, new_depth)
        self._show(new_depth)
        copy_blocks(list(self.blocks_), sources, optimizer)
        if self.silent:
            zero_residual_branches(self.model_, repeats(sources))
            for i in repeats(sources):
                for parameter in self.blocks_[i].parameters():
                    optimizer.state.pop(parameter, None)

    def _show(self, depth: int) -> None:
        """Let the model call that many of its blocks, and its configuration name the number."""
        self.depth_ = self.blocks_.shown = depth
        self.model_.config.num_hidden_layers = depth
        if self.kinds_ is not None:
            self.model_.config.layer_types = self.kinds_[:depth]

    def on_train_end(self, args, state, control, **kwargs):
        """Drop the blocks that a model stopped before its last growth does not have."""
        if hasattr(self.blocks_, "shown"):
            self.blocks_.__class__ = nn.ModuleList
            del self.blocks_.shown, self.blocks_[self.depth_ :]

    def flops_key(self) -> Hashable:
        """Return the number of blocks."""
        return self.depth_

    def report(self) -> Mapping[str, Any]:
        """Report the depths, and the share of block calls relative to the whole model over all steps."""
        return {
            "depths": " ".join(map(str, self.depths_)),
            "blocks_at_the_end": self.depth_,
            "called": self.called_ / max(self.steps_ * self.depths_[-1], 1),
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["called"] < 1 and report["blocks_at_the_end"] == self.depths_[-1]


def _factor(run: Any, lr_scheduler: Any, max_steps: int) -> Callable[[float], float] | None:
    """Return the factor on the peak learning rate by progress; None if it depends on the run."""
    if run is not None and run.learning_rate_factor is not None:
        return run.learning_rate_factor
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if not hasattr(scheduler, "lr_lambdas"):
        return None
    return lambda progress: scheduler.lr_lambdas[0](round(progress * max_steps))
