"""Freeze a model's blocks from the input upwards.

A backward pass ends at the first trainable block, so a frozen block costs its forward pass only.  The first frozen
block gets a detached input: the backward pass does not continue into the embeddings.  They stop learning as well,
except as an output head with tied weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
from torch import nn
from transformers import TrainerState

from hf_accel.surgery.block_wrapper import refuse_waiting_ddp
from hf_accel.surgery.blocks import block_lists
from hf_accel.technique import Fraction, Technique


def find_blocks(model: Any) -> nn.ModuleList:
    """Return the longest of the model's lists of blocks."""
    return max(block_lists(model).values(), key=len)


def detach_input(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Detach the hidden states, a block's first argument, as a forward pre-hook."""
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}


@dataclass(eq=False)
class BlockFreezing(Technique):
    """Freeze blocks from the input upwards; a subclass says how many, in `depth`.

    Args:
        start: Progress, in [0, 1), before which no block is frozen.
        max_fraction: Largest share of the blocks, in [0, 1], that is frozen.
    """

    start: Annotated[float, at.Interval(ge=0, lt=1)] = 0.5
    max_fraction: Fraction = 0.5
    neutral: ClassVar = {"max_fraction": 0.0}
    expected_failed_checks: ClassVar = {
        "check_reentrant_checkpointing": "refused: blocks above frozen ones would get no gradient"
    }
    variations: ClassVar = {"start": 0.75}
    refused_backends: ClassVar = {"zero": "frozen weights keep moving in its flat partitions"}
    claims: ClassVar = frozenset({"frozen_blocks"})
    counters: ClassVar = ("steps", "frozen_steps")

    def depth(self, state: TrainerState, model: nn.Module) -> int:
        """Return the number of blocks that are frozen in the next step, at most ``most_``."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        if args.deepspeed_plugin is not None:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. Use DDP or FSDP."
            )
        refuse_waiting_ddp(self, args, model)
        if any(_is_reentrant(module) for module in model.modules()):
            raise ValueError(
                f"{self!r} does not support reentrant checkpointing because it gives no gradient to blocks above "
                "frozen ones. Set use_reentrant=False."
            )
        try:
            self.blocks_ = find_blocks(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.trainable_ = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks_]
        self.most_ = int(len(self.blocks_) * self.max_fraction + 1e-9)
        self.tied_ = has_tied_head(model)
        if self.most_ and not self._trains_above(model):
            raise ValueError(
                f"{self!r}: nothing that is trained lies above the first {self.most_} of {len(self.blocks_)} blocks. "
                "Lower max_fraction."
            )
        self.hook_ = None
        self.depth_, self.steps_, self.frozen_steps_ = 0, 0, 0

    def _trains_above(self, model: nn.Module) -> bool:
        """Return whether something still gets a gradient with all of ``most_`` blocks frozen."""
        named = list(model.named_parameters())
        inside = {id(p) for block in self.blocks_ for p in block.parameters()}
        first = next(i for i, (_, p) in enumerate(named) if id(p) in inside)
        of_other_stacks = {id(p) for blocks in block_lists(model).values() for p in blocks.parameters()} - inside
        below = {id(p) for _, p in named[:first]} - of_other_stacks
        frozen = {id(p) for block in self.blocks_[: self.most_] for p in block.parameters()}
        return self.tied_ or any(p.requires_grad and id(p) not in below | frozen for _, p in named)

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        self._freeze(self.depth(state, model))
        self.steps_ += 1
        self.frozen_steps_ += self.depth_

    def on_train_end(self, args, state, control, **kwargs):
        frozen = self.depth_
        self._freeze(0)
        self.depth_ = frozen

    def _freeze(self, depth: int) -> None:
        if depth == self.depth_:
            return
        for i, parameters in enumerate(self.trainable_):
            for parameter in parameters:
                parameter.requires_grad_(i >= depth)
                if i < depth:
                    parameter.grad = None  # optimizers pass over parameters without a gradient
        if depth > 0 and self.hook_ is None:
            self.hook_ = self.blocks_[0].register_forward_pre_hook(detach_input, with_kwargs=True)
        elif depth == 0 and self.hook_ is not None:
            self.hook_.remove()
            self.hook_ = None
        self.depth_ = depth

    def report(self) -> Mapping[str, Any]:
        """Report the blocks frozen at the end, the share of frozen blocks over all steps, and the embeddings' fate."""
        return {
            "frozen_blocks": self.depth_,
            "frozen_share": self.frozen_steps_ / max(self.steps_ * len(self.blocks_), 1),
            "embeddings": "learn as the tied output head" if self.tied_ else "frozen with the first block",
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["frozen_share"] > 0


def _is_reentrant(module: nn.Module) -> bool:
    run = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(module, "gradient_checkpointing", False) and run and run.keywords.get("use_reentrant"))


def has_tied_head(model: Any) -> bool:
    """Return whether the output head shares its weight with another module."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    shared = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    return len(shared) > 1
