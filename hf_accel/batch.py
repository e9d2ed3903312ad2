"""Define the data of one training step: the plan of its examples, and their micro-batches.

Shape suffixes: ``N`` examples of a step, ``B`` examples of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import Tensor

ORDER = "order_B"
"""Key under which the owner of ``collate`` returns the order of the examples, if it changes the given one."""


def named_tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of nested mappings, lists and tuples, with the nearest key above it; without one, ``[i]``."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_tensors(value, str(key))
    elif isinstance(batch, list | tuple):
        for i, value in enumerate(batch):
            yield from named_tensors(value, name or f"[{i}]")


class MicroBatch(NamedTuple):
    """The inputs of one forward and backward pass."""

    inputs: Any
    """Output of the collator, usually tensors by name."""
    ids_B: Tensor
    """Index in the training set of each example; -1 for a filler, which counts nothing."""
    weights_B: Tensor | None
    """Weight of each example; None if all are 1."""
    repeats_B: Tensor | None = None
    """Number of earlier uses of each example, see `StepPlan.repeats_N`."""

    def of(self, inputs: Any, positions_B: Tensor) -> MicroBatch:
        """Return a micro-batch of other inputs, with the examples at the given positions of this one."""
        weights_B = None if self.weights_B is None else self.weights_B[positions_B]
        repeats_B = None if self.repeats_B is None else self.repeats_B[positions_B]
        return MicroBatch(inputs, self.ids_B[positions_B], weights_B, repeats_B)

    @property
    def model_inputs(self) -> Any:
        """Return the inputs that the model needs."""
        return self.for_model(self.inputs)

    def for_model(self, inputs: Any) -> Any:
        """Return these inputs without the ``attention_mask`` of packed rows, which would hide ``position_ids``."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if mask is None or len(mask) >= len(self.ids_B):
            return inputs
        return {name: value for name, value in inputs.items() if name != "attention_mask"}


@dataclass(frozen=True)
class StepPlan:
    """The examples of one step, over all ranks, and how one rank divides its share."""

    epoch: int
    ids_N: Tensor
    weights_N: Tensor | None
    micro_batch_size: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    repeats_N: Tensor | None = None
    """Number of earlier uses of each example in the epoch, a part of its random key; None if none comes twice."""

    def chosen(self, positions: Tensor, weights_N: Tensor | None) -> StepPlan:
        """Return the plan of some of the examples; one that is chosen twice has two random keys."""
        repeats_N = None if self.repeats_N is None else self.repeats_N[positions]
        if (again_N := earlier_occurrences(positions)) is not None:
            repeats_N = again_N * 1_000_003 + (0 if repeats_N is None else repeats_N)
        return dataclasses.replace(self, ids_N=self.ids_N[positions], weights_N=weights_N, repeats_N=repeats_N)

    @property
    def has_dummy_micro_batches(self) -> bool:
        """Return whether the last micro-batches have fewer examples than ranks, so that some rank has none."""
        return 0 < len(self.ids_N) % (self.micro_batch_size * self.world) < self.world

    def micro_batches(self) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Return ids, weights and repeats of this rank's micro-batches; id -1 marks a filler, which has weight 0."""
        rows = []
        for positions in split_step(len(self.ids_N), self.micro_batch_size, self.rank, self.world):
            if positions:
                columns = (self.ids_N, self.weights_N, self.repeats_N)
                rows.append(tuple(None if column is None else column[positions] for column in columns))
            else:
                rows.append((torch.tensor([-1]), torch.zeros(1), None))
        return rows


def earlier_occurrences(ids_N: Tensor) -> Tensor | None:
    """Return the number of earlier occurrences of each id, at its place; None if no id comes twice."""
    if len(ids_N) == 0 or torch.bincount(ids_N).max() == 1:
        return None
    sorted_N, order_N = ids_N.sort(stable=True)
    place_N = torch.arange(len(ids_N))
    first_N = place_N.masked_fill(F.pad(sorted_N[1:] == sorted_N[:-1], (1, 0)), 0).cummax(0).values
    return torch.empty_like(ids_N).scatter_(0, order_N, place_N - first_N)


def split_step(num_examples: int, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return the positions of one rank's examples, micro-batch by micro-batch.

    Consecutive chunks of ``micro_batch_size`` go to the ranks in turn, as accelerate shards batches.  An incomplete
    last round is divided evenly.  Every rank gets the same number of micro-batches; the last one is empty if there are
    fewer examples than ranks.
    """
    full, rest = divmod(num_examples, micro_batch_size * world)
    rows = []
    for i in range(full):
        start = (i * world + rank) * micro_batch_size
        rows.append(list(range(start, start + micro_batch_size)))
    if rest:
        start = full * micro_batch_size * world
        sizes = [rest // world + (r < rest % world) for r in range(world)]
        begin = start + sum(sizes[:rank])
        rows.append(list(range(begin, begin + sizes[rank])))
    return rows


@dataclass(frozen=True)
class StepBatch:
    """One optimizer update's worth of data on one rank."""

    plan: StepPlan
    micro_batches: list[MicroBatch]

    @property
    def num_examples(self) -> int:
        """Return the number of examples of the step over all ranks."""
        return len(self.plan.ids_N)

    @property
    def real_micro_batches(self) -> list[MicroBatch]:
        """Return the micro-batches of examples that count."""
        return [micro for micro in self.micro_batches if micro.ids_B[0] >= 0]

    def pin_memory(self) -> StepBatch:
        """Return a copy in page-locked memory; the loader calls it."""
        pinned = [
            micro._replace(inputs=recursively_apply(lambda tensor: tensor.pin_memory(), micro.inputs))
            for micro in self.micro_batches
        ]
        return dataclasses.replace(self, micro_batches=pinned)
