"""Stream step batches from an indexed data set; independent slots decide which examples come next.

    select (which examples) -> order -> batch (how many) -> read and collate (in loader workers) -> StepBatch

One step of the trainer is one `StepBatch`: micro-batches with the examples of one optimizer update.  The plan of a step
names its examples over all ranks, so every rank knows it without communication.  The examples of a step depend neither
on the number of ranks nor on the size of a micro-batch.  The stream's state holds consumed examples, never those that
workers prefetched, so a resumed run continues in O(1) with the same batches.

Shape suffixes: ``N`` examples of a step or an epoch, ``B`` examples of a micro-batch.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from hf_accel.batch import StepBatch, StepPlan, earlier_occurrences
from hf_accel.preserve import keyed_random
from hf_accel.stream.choices import check_order, check_selection
from hf_accel.stream.reader import StepReader
from hf_accel.technique import Technique


@dataclass
class Slots:
    """The owners of the stream's slots, or None for slots without an owner."""

    select: Technique | None = None
    order: Technique | None = None
    batch: Technique | None = None
    collate: Technique | None = None


class _Plans:
    """Draw the steps of the stream's current epoch, as the sampler of a loader."""

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
        batch_size: Examples of a step over all ranks, unless a technique decides.
        micro_batch_size: Examples of one forward pass on one rank.
        seed: Key of every order and choice, together with the epoch.
        sequential: Keep the order of the data set.
        drop_last: Drop the examples at the end of an epoch that do not fill a batch of ``loader_batch_size``.
        loader_batch_size: Examples of a batch of Trainer's own loader over all ranks; None: ``batch_size``.
        slots: Techniques that select, order, batch and collate.
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
        loader_batch_size: int | None = None,
        slots: Slots | None = None,
        loader: Mapping[str, Any] | None = None,
    ):
        self.dataset, self.batch_size, self.micro_batch_size, self.seed = dataset, batch_size, micro_batch_size, seed
        self.rank, self.world, self.sequential, self.drop_last = rank, world, sequential, drop_last
        self.loader_batch_size = loader_batch_size or batch_size
        self.epoch_sizes = self.batch_size, self.loader_batch_size
        self.serves_looks, self.epoch_begins = False, False
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
        """Return the reader of steps, and the loader that reads ahead."""
        if len(self.dataset) == 0:
            raise ValueError("train_dataset has no examples. Give at least one.")
        reader = StepReader(self.dataset, collate)
        several = self.batch_size > self.micro_batch_size * self.world
        if several and loader.get("num_workers") and loader.get("prefetch_factor") is None:
            loader["prefetch_factor"] = 1  # one item is a whole step
        plans: Any = _Plans(self)
        as_it_is: Any = _as_it_is
        return reader, DataLoader(reader, sampler=plans, batch_size=None, collate_fn=as_it_is, **loader)

    # The plan of an epoch -------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Choose and order the examples of an epoch, unless the stream is already inside it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self.ids_N is not None and epoch == self.epoch and 0 < self.consumed < len(self.ids_N):
            return
        self.epoch, self.consumed = epoch, 0
        self.epoch_sizes = self.batch_size, self.loader_batch_size
        self.ids_N, self.weights_N = self._choose(epoch)
        self._drawn.clear()
        self._replay.clear()

    def _choose(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        num_examples, (batch_size, loader_batch_size) = len(self.dataset), self.epoch_sizes
        generator = torch.Generator().manual_seed(self.seed + epoch)
        ids_N, weights_N = torch.arange(num_examples), None
        if self.slots.select is not None:
            chooser = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2 + 1)
            selection = self.slots.select.select(epoch, num_examples, chooser)
            check_selection(self.slots.select, selection, epoch, num_examples)
            ids_N, weights_N = selection
        if self.slots.order is not None:
            ordered_N = self.slots.order.order(ids_N, batch_size, generator)
            check_order(self.slots.order, ordered_N, ids_N, num_examples)
        elif self.sequential:
            ordered_N = ids_N
        else:
            # Trainer's permutation of the whole set, without the examples that were not chosen.
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
            kept = len(ordered_N) // loader_batch_size * loader_batch_size
            ordered_N, weights_N = ordered_N[:kept], None if weights_N is None else weights_N[:kept]
        return ordered_N, weights_N

    def draw(self) -> Iterator[StepPlan]:
        """Yield the plans of the remaining steps of this epoch."""
        assert self.ids_N is not None
        position = self.consumed
        repeats_N = earlier_occurrences(self.ids_N)
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
            yield StepPlan(  # copies, because a view sends its whole base to workers
                self.epoch,
                self.ids_N[position:end].clone(),
                None if self.weights_N is None else self.weights_N[position:end].clone(),
                self.micro_batch_size,
                self.rank,
                self.world,
                self.seed,
                None if repeats_N is None else repeats_N[position:end].clone(),
            )
            position = end

    # The batches ----------------------------------------------------------------------------------------------------

    @property
    def total_batch_size(self) -> int:
        """Return the nominal number of examples of a step over all ranks, by accelerate's name."""
        return self.batch_size

    def __getattr__(self, name: str) -> Any:
        """Return a setting of the loader that reads the data."""
        if name in ("multiprocessing_context", "num_workers", "prefetch_factor", "persistent_workers", "timeout"):
            return getattr(self.loader, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __len__(self) -> int:
        """Return the nominal number of steps of an epoch: all examples at the nominal batch size."""
        num_examples = len(self.dataset)
        if self.drop_last:
            num_examples -= num_examples % self.loader_batch_size
        return max(math.ceil(num_examples / self.batch_size), 1)

    def __iter__(self) -> Iterator[Any]:
        """Return the remaining steps of this epoch, or the inputs of micro-batches outside of training."""
        if self.serves_looks and not self.epoch_begins:
            return self._looks()
        self.epoch_begins = False
        return self._steps()

    def _looks(self) -> Iterator[Any]:
        """Yield the inputs of an epoch from its beginning, without changing the stream."""
        for plan in self._twin().draw():
            yield from (micro.model_inputs for micro in self.read(plan).micro_batches)

    def _twin(self) -> StepStream:
        """Return a copy at the beginning of the epoch; it asks no technique that counts its calls."""
        twin = copy.copy(self)
        twin._drawn, twin._replay, twin.consumed = deque(), deque(), 0
        twin.micro_batch_size = self.loader_batch_size // self.world
        twin.slots = Slots(order=self.slots.order)
        if twin.ids_N is None:
            twin.ids_N, twin.weights_N = twin._choose(self.epoch)
        return twin

    def _steps(self) -> Iterator[StepBatch]:
        if self.consumed:
            # In mid-epoch the loader drew its seed before the checkpoint: draw it without changing the generators.
            with keyed_random():
                batches = iter(self.loader)
        else:
            batches = iter(self.loader)
        for batch in batches:
            self.consumed += self._drawn.popleft()
            yield batch

    def read(self, plan: StepPlan) -> StepBatch:
        """Read a step again, for example in smaller micro-batches."""
        return self.reader[plan]

    @property
    def epoch_is_over(self) -> bool:
        """Return whether every example of this epoch's plan was consumed."""
        return self.ids_N is not None and self.consumed >= len(self.ids_N)

    @property
    def epochs(self) -> float:
        """Return the position in the data, in epochs; inside an epoch, count nominal steps, as Trainer does."""
        if self.ids_N is None:
            return 0.0
        if self.epoch_is_over:
            return self.epoch + 1.0
        return self.epoch + self.consumed / (math.ceil(len(self.ids_N) / self.batch_size) * self.batch_size)

    def pass_over(self, epoch: int, steps: int) -> None:
        """Move to the position of a plain Trainer after this number of steps of an epoch.

        With an owner of `select`, start at the beginning of the epoch, because it has its own examples.
        """
        if steps and self.slots.select is None:
            self.set_epoch(epoch)
            self.consumed = steps * self.batch_size

    # As Trainer's own loader ----------------------------------------------------------------------------------------

    @property
    def total_dataset_length(self) -> int:
        """Return the number of examples in the data set."""
        return len(self.dataset)

    @property
    def sampler(self) -> Any:
        """Return the examples of the present epoch, in order."""
        return self._twin().ids_N.tolist()  # type: ignore[union-attr]

    @property
    def batch_sampler(self) -> Any:
        """Return the examples of the items of the present epoch, unless a technique sizes them."""
        return BatchSampler(self.sampler, self.batch_size, drop_last=False)

    @property
    def collate_fn(self) -> Callable:
        """Return the collator of a micro-batch."""
        return self.reader.collate

    @property
    def num_workers(self) -> int:
        """Return the number of loader workers."""
        return self.loader.num_workers

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream: enough to continue with the next step, bit for bit."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "drawn": list(self._drawn),
            "seed": self.seed,
            "num_examples": len(self.dataset),
            "epoch_sizes": self.epoch_sizes,  # the order of this epoch may depend on its batch sizes
        }
        if self.slots.select is not None and self.ids_N is not None and not self.epoch_is_over:
            # The values behind the choice (losses, say) have changed since, so keep the choice itself.
            state["ids_N"] = self.ids_N
            if self.weights_N is not None:
                state["weights_N"] = self.weights_N
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position that `state_dict` returned."""
        if state["num_examples"] != len(self.dataset):
            raise ValueError(
                f"train_dataset has {len(self.dataset)} examples, the checkpoint's had {state['num_examples']}. "
                "Resume with the same data."
            )
        self.epoch, self.consumed, self.seed = state["epoch"], state["consumed"], state["seed"]
        if "ids_N" in state:
            self.ids_N, self.weights_N = state["ids_N"], state.get("weights_N")
        elif self.slots.select is None:
            self.epoch_sizes = state["epoch_sizes"]
            self.ids_N, self.weights_N = self._choose(self.epoch)
        else:
            self.ids_N, self.weights_N = torch.arange(self.consumed), None  # the epoch was over
        self._drawn.clear()
        self._replay = deque(state["drawn"])


class _Collate:
    """Bind the collate slot to the user's collator; picklable, for spawned workers."""

    def __init__(self, owner: Technique, collator: Callable):
        self.owner, self.collator = owner, collator

    def __getstate__(self) -> dict[str, Any]:
        owner = copy.copy(self.owner)
        vars(owner).pop("run_", None)  # the trainer stays where it is
        return {"owner": owner, "collator": self.collator}

    def __call__(self, features: list[Any]) -> Mapping[str, Any]:
        return self.owner.collate(features, self.collator)


def _as_it_is(batch: StepBatch) -> StepBatch:
    return batch
