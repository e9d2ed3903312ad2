"""Skip residual branches for random examples, more of them in deeper blocks.

An example keeps block l of the L blocks of a stack, or residual branches of a ResNet, with the probability

    q_l = 1 - l / (L - 1) * (1 - keep)        l = 0 for the first block

A block computes the examples that keep it, as a batch of their own, and no others.  On average that saves
(1 - keep) / 2 of the computation.  The change that a block makes to their hidden states x is scaled,

    x + (block(x) - x) / q_l    or, if an activation follows the sum,    branch(x) / q_l

so in expectation a stack adds as much as in evaluation, which computes all blocks unscaled.  The draws depend on the
seed, the step and the example, so micro-batches and ranks make no difference.

Recommendation: Use StochasticDepth if you train a deep ResNet or vision transformer for many epochs.
When to use: Long training of deep residual networks and vision transformers, where it is a regularizer first; the
authors report 25 % less time.
When not to use:
- Short training and fine-tuning.
- Micro-batches of few examples, where nothing is saved.
- Rows with several examples, which are dropped as one, and models with several towers.
- Norms after the addition (BERT), where the scaled sum is no longer normed.  Batch norms see the kept examples alone.
Defaults: ``keep`` is the authors'.
Differences from the paper:
- Each example draws separately, as is usual since.
- The first block is always kept, and the scale is applied in training.
- A block computes at least one example of a micro-batch (two with batch norms), and ignores it if none keeps the block.
References: Huang et al. (2016), stochastic depth, https://arxiv.org/abs/1603.09382.
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
from hf_accel.host.internals import attention_of
from hf_accel.surgery.block_wrapper import ExampleSeeds, refuse_other_shape, wrap_block
from hf_accel.surgery.blocks import block_stacks
from hf_accel.technique import Technique


class Place(NamedTuple):
    """Place of a block, and how it is computed."""

    block: nn.Module
    parameters: list[str]
    """Names of its arguments."""
    stack: int
    column: int
    """Index among the blocks of all stacks."""
    keep: float
    """Probability that an example keeps it."""
    least: int
    """Smallest number of rows that it computes."""
    is_branch: bool
    """Whether it returns the added term instead of the sum."""

    def rows(self, kept_R: np.ndarray) -> np.ndarray:
        """Return the computed rows, ascending: the kept ones, filled up with the first others if they are too few."""
        needed = max(int(kept_R.sum()), min(self.least, len(kept_R)))
        return np.sort(np.argsort(~kept_R, kind="stable")[:needed])


class Drawn(NamedTuple):
    """Draws of a batch."""

    num_rows: int
    rows: Sequence[Tensor]
    """Rows that each block computes, (K,)."""
    scales: Sequence[Tensor]
    """Factors on the change that it makes, (K,); 0 for rows that do not keep it."""


def keep_probabilities(num_blocks: int, keep: float) -> list[float]:
    """Return the probability that an example keeps each block of a stack."""
    return (1 - np.arange(num_blocks) / max(num_blocks - 1, 1) * (1 - keep)).tolist()


def stacks_of(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stack, or the branches beside the shortcuts of a ResNet."""
    if branches := [block.layer for block in model.modules() if hasattr(block, "shortcut") and hasattr(block, "layer")]:
        return [branches]
    return block_stacks(model)


def rows_of(name: str, value: Any, rows_K: Tensor, num_rows: int) -> Any:
    """Return a block's argument for some of the rows."""
    if isinstance(value, tuple):
        return tuple(rows_of(name, item, rows_K, num_rows) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != num_rows:
        return value
    of_rows = value.dim() > 2 or "mask" in name or "ids" in name  # else one for all, by position
    return value[rows_K] if of_rows else value


@dataclass(eq=False)
class StochasticDepth(Technique):
    """Skip residual branches for some of the examples; needs no more than a plain Trainer.

    Args:
        keep: Probability of keeping the deepest block, in (0, 1]; it rises to 1 for the first block.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
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
            raise ValueError(
                f"{self!r} needs more than one block, because the first is always kept; {name} has one. Remove "
                "StochasticDepth."
            )
        if args.torch_compile:
            raise ValueError(
                f"{self!r} does not support torch_compile because each number of examples would be compiled. "
                "Set torch_compile=False."
            )
        if (attention := attention_of(base)).startswith(("flex", "paged")):
            raise ValueError(
                f"{self!r} does not support {attention} attention because it has one mask for all rows. Use sdpa."
            )
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
        # Not a method: copies of the model would copy the technique as well.
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
        """Draw for the rows of the model's batch."""
        keys = None if self.keys_ is None or self.keep == 1 else self.keys_.of_examples(model, inputs)
        self.drawn_ = None
        if keys is not None and torch.is_grad_enabled():
            main = _main_input(model, inputs)
            kept_RL = self._draw(keys, len(main))
            self.drawn_ = self._on_device(kept_RL, main.device)
            self.counts_["kept"] += int(kept_RL.sum())
            self.counts_["all"] += kept_RL.size

    def _draw(self, keys: list[int], num_rows: int) -> np.ndarray:
        """Return which rows keep which blocks, (R, L)."""
        assert self.keys_ is not None
        packed = num_rows != len(keys)
        of_rows = [(keys[0], row) for row in range(num_rows)] if packed else [(key,) for key in keys]
        generators = [np.random.default_rng((*self.keys_.of_step, *key)) for key in of_rows]
        drawn_RL = np.stack([generator.random(len(self.places_)) for generator in generators])
        return drawn_RL < [place.keep for place in self.places_]

    def _on_device(self, kept_RL: np.ndarray, device: torch.device) -> Drawn:
        """Move the draws in two copies for all blocks, because each copy waits for the device."""
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
            raise ValueError(
                f"{self!r} does not support this model because its blocks see {len(x)} rows of {self.drawn_.num_rows}. "
                "Remove StochasticDepth."
            )
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
        return (new, *self.beside_.get(place.stack, beside))  # for example position biases, which T5's blocks pass on

    def flops_key(self) -> Hashable:
        """Count the rows that all blocks of one size compute."""
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
        """Report the share of blocks that examples kept, on this rank."""
        return {"kept": self.counts_["kept"] / self.counts_["all"] if self.counts_["all"] else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1


def _main_input(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return inputs[getattr(model, "main_input_name", "input_ids")]
