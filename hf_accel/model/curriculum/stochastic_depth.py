"""Stochastic depth: each example leaves out residual branches, the more the deeper they lie.

Of the L blocks of a stack, or the residual branches of a ResNet, an example keeps block l (0 the first) with the
probability

    q_l = 1 - l / (L - 1) * (1 - keep)

A block computes the examples that keep it, as a batch of their own, and no others, so that on average (1 - keep) / 2 of
the computation is saved.  What it adds to their hidden states x is scaled,

    x + (block(x) - x) / q_l    or, where the sum is followed by an activation,    branch(x) / q_l

so that in expectation a stack adds what it adds in evaluation, where all blocks are computed as they are.  The draws
are keyed by the seed, the step and the example: micro-batches and ranks make no difference.

Reference: Huang et al. (2016), stochastic depth, https://arxiv.org/abs/1603.09382.  Departures: each example draws for
itself, as is usual since; the first block is always kept, and the scale is that of training.  At least one example of a
micro-batch is computed (two where there are batch norms); where none keeps a block, for nothing.

When to use: long training of deep residual networks and vision transformers, where it is a regularizer first; the
authors report 25 % less time.
When not to use: short training; fine-tuning; micro-batches of few examples, where nothing is saved; with rows that hold
several examples, which are dropped as one.  Batch norms see the kept examples alone.  Where norms come after
the addition (BERT), what is scaled is no longer normed.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import annotated_types as at
import numpy as np
import torch
from torch import Tensor, nn

from hf_accel.adapters import unwrapped
from hf_accel.surgery.block_wrapper import ExampleSeeds, refuse_other_shape, wrap_block
from hf_accel.surgery.blocks import block_stacks
from hf_accel.technique import Technique


class Place(NamedTuple):
    """Where a block lies."""

    block: nn.Module
    parameters: list[str]
    """Names of its arguments."""
    stack: int
    column: int
    """Among the blocks of all stacks."""
    keep: float
    """How probably it is kept."""
    least: int
    """Rows that are computed in any case."""
    is_branch: bool
    """Whether it gives what is added, and not the sum."""

    def rows(self, kept_R: np.ndarray) -> np.ndarray:
        """Those that are computed, ascending: those that are kept, and where these are too few the first others."""
        needed = max(int(kept_R.sum()), min(self.least, len(kept_R)))
        return np.sort(np.argsort(~kept_R, kind="stable")[:needed])


class Drawn(NamedTuple):
    """What a batch draws."""

    num_rows: int
    rows: Sequence[Tensor]
    """Those that each block computes, (K,)."""
    scales: Sequence[Tensor]
    """By which it multiplies what it adds, (K,); 0 for rows that do not keep it."""


def keep_probabilities(num_blocks: int, keep: float) -> list[float]:
    """How probably each block of a stack is kept."""
    return (1 - np.arange(num_blocks) / max(num_blocks - 1, 1) * (1 - keep)).tolist()


def stacks_of(model: Any) -> list[list[nn.Module]]:
    """The blocks that follow each other, stack by stack, or the branches beside the shortcuts of a ResNet."""
    if branches := [block.layer for block in model.modules() if hasattr(block, "shortcut") and hasattr(block, "layer")]:
        return [branches]
    return block_stacks(model)


def rows_of(name: str, value: Any, rows_K: Tensor, num_rows: int) -> Any:
    """A block's argument for some of the rows."""
    if isinstance(value, tuple):
        return tuple(rows_of(name, item, rows_K, num_rows) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != num_rows:
        return value
    of_rows = value.dim() > 2 or "mask" in name or "ids" in name  # else one for all, by position
    return value[rows_K] if of_rows else value


@dataclass(eq=False)
class StochasticDepth(Technique):
    """Leaves out residual branches for some of the examples; needs no more than a plain Trainer.

    Args:
        keep: How probably the deepest block is kept, in (0, 1]; the others more probably, the first always.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # the authors'
    neutral: ClassVar = {"keep": 1.0}
    expected_failed_checks: ClassVar = {
        "check_reentrant_checkpointing": "it adds the gradients of a block's examples in another order: losses differ "
        "in the last digit"
    }
    rank_counters: ClassVar = ("counts",)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        base = unwrapped(model)
        try:
            stacks = stacks_of(base)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        name = type(base).__name__
        if all(len(blocks) == 1 for blocks in stacks):
            raise ValueError(f"{self!r}: {name} has one block, and the first is always kept. Leave it out.")
        if args.torch_compile:
            raise ValueError(
                f"{self!r}: a compiled model would be compiled for each number of examples. Leave one out."
            )
        if (getattr(base.config, "_attn_implementation", None) or "").startswith(("flex", "paged")):
            raise ValueError(f"{self!r}: {base.config._attn_implementation} attention has one mask for all. Use sdpa.")
        self.keys_: ExampleSeeds | None = None
        self.drawn_: Drawn | None = None
        self.beside_: dict[int, tuple] = {}
        self.counts_ = {"kept": 0, "all": 0}
        self.places_: list[Place] = []
        self.ends_ = []
        for stack, blocks in enumerate(stacks):
            for block, keep in zip(blocks, keep_probabilities(len(blocks), self.keep), strict=True):
                parameters = list(inspect.signature(block.forward).parameters)
                least = 1 + any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in block.modules())
                is_branch = isinstance(block, nn.Sequential)
                place = Place(block, parameters, stack, len(self.places_), keep, least, is_branch)
                self.places_.append(place)
                self.ends_.append(wrap_block(block, functools.partial(self._call, place), innermost=True))
        # A function of its own, for copies of the model are not to copy the technique as well.
        self.hook_ = model.register_forward_pre_hook(lambda _, args, inputs: self._see(model, inputs), with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.keys_ = ExampleSeeds(self, args, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn_ = self.keys_ = None
        self.beside_.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self.hook_.remove()
        for end in self.ends_:
            end()

    def _see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Draw for the rows of the batch that the model is given."""
        keys = None if self.keys_ is None or self.keep == 1 else self.keys_.of_examples(model, inputs)
        self.drawn_ = None
        if keys is not None and torch.is_grad_enabled():
            main = _main_input(model, inputs)
            kept_RL = self._draw(keys, len(main))
            self.drawn_ = self._on_device(kept_RL, main.device)
            self.counts_["kept"] += int(kept_RL.sum())
            self.counts_["all"] += kept_RL.size

    def _draw(self, keys: list[int], num_rows: int) -> np.ndarray:
        """Which rows keep which blocks, (R, L)."""
        assert self.keys_ is not None
        packed = num_rows != len(keys)
        of_rows = [(keys[0], row) for row in range(num_rows)] if packed else [(key,) for key in keys]
        generators = [np.random.default_rng((*self.keys_.of_step, *key)) for key in of_rows]
        drawn_RL = np.stack([generator.random(len(self.places_)) for generator in generators])
        return drawn_RL < [place.keep for place in self.places_]

    def _on_device(self, kept_RL: np.ndarray, device: torch.device) -> Drawn:
        """In two copies for all blocks, for each of them waits."""
        rows = [place.rows(kept_RL[:, place.column]) for place in self.places_]
        scales = [kept_RL[own, place.column] / place.keep for own, place in zip(rows, self.places_, strict=True)]
        sizes = [len(own) for own in rows]
        return Drawn(
            len(kept_RL),
            torch.from_numpy(np.concatenate(rows)).to(device).split(sizes),
            torch.from_numpy(np.concatenate(scales)).float().to(device).split(sizes),
        )

    def _call(self, place: Place, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.drawn_ is None or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        given = dict(zip(place.parameters, args, strict=False)) | kwargs
        first = place.parameters[0]
        x = given[first]
        if len(x) != self.drawn_.num_rows:
            raise ValueError(f"{self!r}: blocks see {len(x)} rows, the batch has {self.drawn_.num_rows}. Leave it out.")
        rows_K, scale = (of_blocks[place.column].to(x.device) for of_blocks in (self.drawn_.rows, self.drawn_.scales))
        whole = len(rows_K) == len(x)
        if not whole:
            given = {name: rows_of(name, value, rows_K, len(x)) for name, value in given.items()}
        output = call(
            *(given[name] for name in place.parameters[: len(args)]), **{name: given[name] for name in kwargs}
        )
        new, beside = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not place.is_branch:
            refuse_other_shape(self, given[first], new)
        if place.keep < 1:
            scale = scale.to(x.dtype).view(-1, *[1] * (new.dim() - 1))
            new = new * scale if place.is_branch else given[first] + (new - given[first]) * scale
        if not whole:
            base = new.new_zeros(len(x), *new.shape[1:]) if place.is_branch else x
            new = base.index_copy(0, rows_K, new.to(base.dtype))
        if beside is None:
            return new
        if whole:
            self.beside_[place.stack] = beside
        return (new, *self.beside_.get(place.stack, beside))  # as position biases, which T5's blocks pass on

    def flops_key(self) -> Hashable:
        """How many rows are computed by all blocks of one size."""
        keys = self.keys_
        if keys is None or self.keep == 1:
            return None
        if not keys.streamed:
            return (*keys.of_step, keys.passes)
        if (micro := keys.run.micro_batch) is None:
            return None
        drawn_RL = self._draw(keys.of_micro_batch(), len(_main_input(keys.run.model, micro.inputs)))
        computed = Counter[int]()
        for place in self.places_:
            size = sum(parameter.numel() for parameter in place.block.parameters())
            computed[size] += len(place.rows(drawn_RL[:, place.column]))
        return tuple(sorted(computed.items()))

    def report(self) -> Mapping[str, Any]:
        """The share of the blocks that examples kept, on this rank."""
        return {"kept": self.counts_["kept"] / self.counts_["all"] if self.counts_["all"] else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1


def _main_input(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return inputs[getattr(model, "main_input_name", "input_ids")]
