"""One stream of step batches: what the model trains on next, decided in independent places.

    select (which examples) -> order -> batch (how many) -> read and collate (in loader workers) -> StepBatch

One step of the trainer is one `StepBatch`: micro-batches whose examples are those of one optimizer update.  The plan of
a step names its examples over all ranks, so every rank knows it without communication, and the examples of a step do
not depend on the number of ranks or on the size of a micro-batch.  The stream's state is what was consumed, never what
workers prefetched, so a resumed run goes on in O(1) with the same batches.

Shape suffixes: ``N`` examples of a step or an epoch, ``B`` examples of a micro-batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hf_accel.technique import Technique

ORDER = "order_B"
"""Key under which the owner of ``collate`` says in which order it laid the examples, where not in the given one."""


class MicroBatch(NamedTuple):
    """What one forward and backward pass sees."""

    inputs: dict[str, Tensor]
    ids_B: Tensor
    """Index in the training set of each example; -1 for a filler, which counts nothing."""
    weights_B: Tensor | None
    """How much each example counts; None where all count 1."""


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

    @property
    def has_fillers(self) -> bool:
        """Whether the last micro-batches are fewer examples than ranks, so that some rank has none."""
        return 0 < len(self.ids_N) % (self.micro_batch_size * self.world) < self.world

    def micro_batches(self) -> list[tuple[Tensor, Tensor | None]]:
        """Ids and weights of each of this rank's micro-batches; id -1 marks a filler, which has weight 0."""
        ids, weights = self.ids_N, self.weights_N
        rows = []
        for positions in split_step(len(ids), self.micro_batch_size, self.rank, self.world):
            if positions:
                rows.append((ids[positions], None if weights is None else weights[positions]))
            else:
                rows.append((torch.tensor([-1]), torch.zeros(1)))
        return rows


def split_step(num_examples: int, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Positions of one rank's examples, micro-batch by micro-batch.

    Consecutive chunks of ``micro_batch_size`` go to the ranks in turn, as accelerate shards batches; what does not fill
    a last round is shared out evenly.  Every rank gets the same number of micro-batches, the last one empty where there
    are fewer examples than ranks.
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
        """Examples of the step over all ranks."""
        return len(self.plan.ids_N)

    @property
    def without_fillers(self) -> list[MicroBatch]:
        """The micro-batches of examples that count."""
        return [micro for micro in self.micro_batches if micro.ids_B[0] >= 0]

    def pin_memory(self) -> StepBatch:
        """A copy in page-locked memory; called by the loader."""
        pinned = [
            micro._replace(inputs={k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in micro.inputs.items()})
            for micro in self.micro_batches
        ]
        return dataclasses.replace(self, micro_batches=pinned)


class StepReader(Dataset):
    """Reads and collates the examples of a plan; runs in loader workers.

    Random transforms and collators draw from generators keyed by (seed, epoch, first example), and leave the global
    ones as they were: what is read does not depend on workers, prefetching or what the model drew.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]]):
        self.dataset, self.collate = dataset, collate
        # Datasets that read rows at once do so, unless a transform may draw, for each example by its own key.
        self.reads_rows = hasattr(dataset, "__getitems__") and not _has_transform(dataset)

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        with keyed_random():
            return StepBatch(plan, [self._read(plan, ids_B, weights_B) for ids_B, weights_B in plan.micro_batches()])

    def _read(self, plan: StepPlan, ids_B: Tensor, weights_B: Tensor | None) -> MicroBatch:
        ids = [i if i >= 0 else int(plan.ids_N[0]) for i in ids_B.tolist()]
        if self.reads_rows:
            features = self.dataset.__getitems__(ids)
        else:
            features = []
            for i in ids:
                seed_all(plan.seed, plan.epoch, i)
                features.append(self.dataset[i])
        seed_all(plan.seed, plan.epoch, ids[0])
        inputs = dict(self.collate(features))
        if (order_B := inputs.pop(ORDER, None)) is not None:
            ids_B, weights_B = ids_B[order_B], None if weights_B is None else weights_B[order_B]
        return MicroBatch(inputs, ids_B, weights_B)


def _has_transform(dataset: Any) -> bool:
    if isinstance(dataset, Subset):
        return not isinstance(dataset.dataset, datasets.Dataset) or _has_transform(dataset.dataset)
    return getattr(dataset, "format", {}).get("type") == "custom"


def seed_all(seed: int, epoch: int, example: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators by a key."""
    key = (seed * 1_000_003 + epoch) * 1_000_003 + example
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.random.default_generator.manual_seed(key % 2**63)


@contextlib.contextmanager
def keyed_random() -> Iterator[None]:
    """Leave the global generators of the CPU as they were found."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@dataclass
class Slots:
    """The owners of the stream's slots; None where nobody owns one."""

    select: Technique | None = None
    order: Technique | None = None
    batch: Technique | None = None
    collate: Technique | None = None


class _Plans:
    """The sampler that a loader asks: it draws the steps of the epoch that the stream stands in."""

    def __init__(self, stream: StepStream):
        self.stream = stream

    def __iter__(self) -> Iterator[StepPlan]:
        return self.stream.draw()

    def __len__(self) -> int:
        return len(self.stream)


class StepStream:
    """An iterable of step batches, one epoch each time, with a state.

    Args:
        dataset: A map-style training set.
        collate: Makes one micro-batch's inputs from a list of examples.
        batch_size: Examples of a step over all ranks, where no technique says otherwise.
        micro_batch_size: Examples of one forward pass on one rank.
        seed: With the epoch, the key of every order and choice.
        sequential: Keep the order of the data set.
        drop_last: Leave out a last step that is smaller than ``batch_size``.
        slots: Who selects, orders, batches and collates.
        loader: Keyword arguments of ``torch.utils.data.DataLoader``: workers, pinning, prefetching.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        sequential: bool = False,
        drop_last: bool = False,
        slots: Slots | None = None,
        loader: Mapping[str, Any] | None = None,
    ):
        self.dataset, self.batch_size, self.micro_batch_size, self.seed = dataset, batch_size, micro_batch_size, seed
        self.rank, self.world, self.sequential, self.drop_last = rank, world, sequential, drop_last
        self.slots = slots or Slots()
        owner = self.slots.collate
        collate = collate if owner is None else _Collate(owner, collate)
        self.reader, self.loader = self._reading(collate, dict(loader or {}))
        self.epoch = 0
        self.consumed = 0
        self.ids_N: Tensor | None = None
        self.weights_N: Tensor | None = None
        self._drawn: deque[int] = deque()
        self._replay: deque[int] = deque()

    def _reading(self, collate: Callable, loader: dict[str, Any]) -> tuple[StepReader, DataLoader]:
        """What reads a step, and what runs ahead with reading."""
        if len(self.dataset) == 0:
            raise ValueError("train_dataset: it has no examples. Give at least one.")
        reader = StepReader(self.dataset, collate)
        several = self.batch_size > self.micro_batch_size * self.world
        if several and loader.get("num_workers") and loader.get("prefetch_factor") is None:
            loader["prefetch_factor"] = 1  # one item is a whole step
        plans: Any = _Plans(self)
        as_it_is: Any = _as_it_is
        return reader, DataLoader(reader, sampler=plans, batch_size=None, collate_fn=as_it_is, **loader)

    # The plan of an epoch -------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Choose and order the examples of an epoch, unless the stream already stands inside it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self.ids_N is not None and epoch == self.epoch and 0 < self.consumed < len(self.ids_N):
            return
        self.epoch, self.consumed = epoch, 0
        self.ids_N, self.weights_N = self._choose(epoch)
        self._drawn.clear()
        self._replay.clear()

    def _choose(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        num_examples = len(self.dataset)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        ids_N, weights_N = torch.arange(num_examples), None
        if self.slots.select is not None:
            chooser = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2 + 1)
            ids_N, weights_N = self.slots.select.select(epoch, num_examples, chooser)
            if len(ids_N) == 0:
                raise ValueError(f"{self.slots.select!r}: it chose no example of epoch {epoch}. Keep more.")
        if self.slots.order is not None:
            ordered_N = self.slots.order.order(ids_N, self.batch_size, generator)
        elif self.sequential:
            ordered_N = ids_N
        else:
            # The permutation of the whole set, as Trainer draws it, without what was not chosen.
            permutation_N = torch.randperm(num_examples, generator=generator)
            repeats_N = torch.bincount(ids_N, minlength=num_examples)
            ordered_N = permutation_N.repeat_interleave(repeats_N[permutation_N])
            if repeats_N.max() > 1:  # copies of an example must not lie side by side
                ordered_N = ordered_N[torch.randperm(len(ordered_N), generator=generator)]
        if weights_N is not None:
            by_id_N = torch.zeros(num_examples, dtype=weights_N.dtype)
            by_id_N[ids_N] = weights_N
            weights_N = by_id_N[ordered_N]
        if self.drop_last:
            kept = len(ordered_N) // self.batch_size * self.batch_size
            ordered_N, weights_N = ordered_N[:kept], None if weights_N is None else weights_N[:kept]
        return ordered_N, weights_N

    def draw(self) -> Iterator[StepPlan]:
        """The plans of the steps that are still to come in this epoch."""
        assert self.ids_N is not None
        position = self.consumed
        while position < len(self.ids_N):
            upcoming_N = self.ids_N[position:]
            if self._replay:
                size = self._replay.popleft()
            elif self.slots.batch is None:
                size = self.batch_size
            else:
                size = self.slots.batch.batch(upcoming_N, self.batch_size)
            size = min(max(int(size), 1), len(upcoming_N))
            end = position + size
            self._drawn.append(size)
            yield StepPlan(  # copies: workers are sent all that a view is of
                self.epoch,
                self.ids_N[position:end].clone(),
                None if self.weights_N is None else self.weights_N[position:end].clone(),
                self.micro_batch_size,
                self.rank,
                self.world,
                self.seed,
            )
            position = end

    # The batches ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Nominal number of steps of an epoch: of all examples at the nominal batch size."""
        steps = len(self.dataset) / self.batch_size
        return max(math.floor(steps) if self.drop_last else math.ceil(steps), 1)

    def __iter__(self) -> Iterator[StepBatch]:
        if self.consumed:
            # In mid-epoch the loader's own seed was drawn before the checkpoint: draw it without a trace.
            with keyed_random():
                batches = iter(self.loader)
        else:
            batches = iter(self.loader)
        for batch in batches:
            self.consumed += self._drawn.popleft()
            yield batch

    def read(self, plan: StepPlan) -> StepBatch:
        """Read a step once more, for example in smaller micro-batches."""
        return self.reader[plan]

    @property
    def epoch_is_over(self) -> bool:
        """Whether every example of this epoch's plan was consumed."""
        return self.ids_N is not None and self.consumed >= len(self.ids_N)

    @property
    def epochs(self) -> float:
        """Position in the data, in epochs; inside an epoch, in nominal steps, as Trainer counts."""
        if self.ids_N is None:
            return 0.0
        if self.epoch_is_over:
            return self.epoch + 1.0
        return self.epoch + self.consumed / (math.ceil(len(self.ids_N) / self.batch_size) * self.batch_size)

    def pass_over(self, epoch: int, steps: int) -> None:
        """Stand where a plain Trainer does after so many steps of an epoch; at its beginning, where it is chosen of
        which examples the epoch is."""
        if steps and self.slots.select is None:
            self.set_epoch(epoch)
            self.consumed = steps * self.batch_size

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: enough to go on with the next step, bit for bit."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "drawn": list(self._drawn),
            "seed": self.seed,
            "num_examples": len(self.dataset),
        }
        if self.slots.select is not None and self.ids_N is not None and not self.epoch_is_over:
            # What an epoch was chosen from (losses, say) has changed since: keep the choice itself.
            state["ids_N"] = self.ids_N
            if self.weights_N is not None:
                state["weights_N"] = self.weights_N
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_dict` was taken."""
        if state["num_examples"] != len(self.dataset):
            raise ValueError(
                f"train_dataset has {len(self.dataset)} examples, the checkpoint's had {state['num_examples']}. "
                "Resume with the same data."
            )
        self.epoch, self.consumed, self.seed = state["epoch"], state["consumed"], state["seed"]
        if "ids_N" in state:
            self.ids_N, self.weights_N = state["ids_N"], state.get("weights_N")
        elif self.slots.select is None:
            self.ids_N, self.weights_N = self._choose(self.epoch)
        else:
            self.ids_N, self.weights_N = torch.arange(self.consumed), None  # the epoch was over
        self._drawn.clear()
        self._replay = deque(state["drawn"])


class _Collate:
    """The collate slot with the user's collator bound; picklable, for spawned workers."""

    def __init__(self, owner: Technique, collator: Callable):
        self.owner, self.collator = owner, collator

    def __getstate__(self) -> dict[str, Any]:
        owner = copy.copy(self.owner)
        vars(owner).pop("host_", None)  # the trainer stays where it is
        return {"owner": owner, "collator": self.collator}

    def __call__(self, features: list[Any]) -> Mapping[str, Any]:
        return self.owner.collate(features, self.collator)


def _as_it_is(batch: StepBatch) -> StepBatch:
    return batch
