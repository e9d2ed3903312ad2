"""Stream step batches from data without an index, such as ``datasets.IterableDataset``.

An example's id is its position in the epoch, and a step takes the next ones.  They are read ahead far enough that the
owner of ``batch`` sees upcoming ones.  Every rank reads the whole stream and keeps its share, so the examples of a step
do not depend on the number of ranks.  One order has one reader: the main process or, with ``dataloader_num_workers``,
one worker.  (There, ``datasets`` itself draws a shuffle buffer in another way than in the main process.)

A run continues where it stopped.  A ``datasets`` stream without a shuffle buffer goes there at once, from a state at
most one window before.  Any other stream is read again up to the position: a shuffle buffer is not in its state, and
other streams have no state.  On resume, compare the last consumed example by hash.
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from hf_accel.batch import StepBatch, StepPlan
from hf_accel.preserve import keyed_random, seed_all
from hf_accel.stream.indexed import StepStream
from hf_accel.stream.reader import StepReader

logger = logging.get_logger(__name__)


class Window(NamedTuple):
    """Consecutive examples of a stream."""

    position: int
    examples: list[Any]
    state: dict[str, Any] | None
    """State of the data set before the first example; None if it has no exact state."""


class Windows(IterableDataset):
    """Read a stream of examples in windows of ``size``, each example under its own random key.

    An iteration begins at ``start``, the position and the state of a window.
    """

    def __init__(self, dataset: Any, size: int, seed: int):
        self.dataset, self.size, self.seed = dataset, size, seed
        self.epoch = 0
        self.start: tuple[int, dict[str, Any] | None] = (0, None)

    def __iter__(self) -> Iterator[Window]:
        position, state = self.start
        if state is not None:
            self.dataset.load_state_dict(state)
        elif not hasattr(self.dataset, "set_epoch") and isinstance(
            getattr(self.dataset, "generator", None), torch.Generator
        ):
            self.dataset.generator.manual_seed(self.seed + self.epoch)  # as Trainer does for such data
        stateful, examples, size = has_exact_state(self.dataset), iter(self.dataset), self.size
        while size == self.size:
            state = self.dataset.state_dict() if stateful and position else None
            window = []
            with keyed_random():
                for i in range(position, position + size):
                    seed_all(self.seed, self.epoch, i)
                    try:
                        window.append(next(examples))
                    except StopIteration:
                        break
            if self.start[1] is not None:
                self.dataset.load_state_dict(None)  # the next iteration starts from the beginning
            size = len(window)
            if size:
                yield Window(position, window, state)
            position += size


def has_exact_state(dataset: Any) -> bool:
    """Return whether a data set's own state restores its exact position."""
    if not isinstance(dataset, datasets.IterableDataset):
        return False
    chain = [dataset._ex_iterable]
    while chain:
        link: Any = chain.pop()
        if isinstance(link, BufferShuffledExamplesIterable):
            return False
        chain += getattr(link, "ex_iterables", None) or filter(None, [getattr(link, "ex_iterable", None)])
    return True


def digest(example: Any) -> str:
    """Hash an example; objects that are not plain data count only by their type."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = (
                value.detach().cpu().float().numpy() if value.dtype == torch.bfloat16 else value.detach().cpu().numpy()
            )
        if isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple) and any(not isinstance(item, int | float | str) for item in value):
            for item in value:
                add(item)
        else:
            plain = isinstance(value, str | int | float | bytes | list | tuple | None)
            found.update((repr(value) if plain else type(value).__name__).encode())

    add(example)
    return found.hexdigest()


class IterableStepStream(StepStream):
    """A `StepStream` of a data set that supports iteration only.

    ``dataset`` may have a ``set_epoch``; it must give the same examples on every rank.  Without a length, an epoch
    counts as ``nominal_examples``, the examples of the whole run, until it ends, as in Trainer.  As in Trainer,
    ``drop_last`` drops nothing.
    """

    def __init__(self, dataset: Any, collate: Callable, *, nominal_examples: float = float("inf"), **kwargs: Any):
        kwargs["drop_last"] = False
        super().__init__(dataset, collate, **kwargs)
        self.nominal_examples = nominal_examples
        self.num_read = 0
        self.ended = False
        self._starts: deque[tuple[int, dict[str, Any] | None]] = deque([(0, None)])
        self._last = ""

    def _reading(self, collate: Callable, loader: dict[str, Any]) -> tuple[StepReader, DataLoader]:
        self.pins = loader.pop("pin_memory", False)
        loader.pop("persistent_workers", None)
        loader["num_workers"] = min(loader.get("num_workers", 0), 1)
        self.windows = Windows(self.dataset, self.batch_size, self.seed)
        self.examples: dict[int, Any] = {}
        as_it_is: Any = _window_as_it_is
        return StepReader(self.examples, collate), DataLoader(
            self.windows, batch_size=None, collate_fn=as_it_is, **loader
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the stream is already inside it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if epoch == self.epoch and self.consumed and not self.epoch_is_over:
            return
        self.epoch, self.consumed, self.num_read, self.ended = epoch, 0, 0, False
        self._starts = deque([(0, None)])

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def batch_sampler(self) -> None:
        return None

    def _looks(self) -> Iterator[Any]:
        # A second iteration would spoil the state of this one in `datasets`, and a loader would draw its seed.
        stateful = isinstance(self.dataset, datasets.IterableDataset)
        twin = IterableStepStream(
            copy.deepcopy(self.dataset) if stateful else self.dataset,
            self.reader.collate,
            batch_size=self.batch_size,
            micro_batch_size=self.loader_batch_size // self.world,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
        )
        twin.loader = twin.windows  # type: ignore[assignment]
        twin.set_epoch(self.epoch)
        for batch in twin:
            yield from (micro.model_inputs for micro in batch.micro_batches)

    def _steps(self) -> Iterator[StepBatch]:
        if self.consumed == 0:
            windows = self._windows_from(0, None)
        else:
            with keyed_random():  # in mid-epoch the loader drew its seed before the checkpoint
                windows = self._windows_where_it_stopped()
        while self._read_ahead(windows, self.batch_size + 1):
            end = self.consumed + self._size(windows)
            plan = StepPlan(
                self.epoch,
                torch.arange(self.consumed, end),
                None,
                self.micro_batch_size,
                self.rank,
                self.world,
                self.seed,
            )
            self._last = digest(self.examples[end - 1])
            batch = self.reader[plan]
            self.consumed = end
            while len(self._starts) > 1 and self._starts[1][0] < end:
                self._starts.popleft()
            yield batch.pin_memory() if self.pins else batch
            for position in plan.ids_N.tolist():  # the step may have been read again until here
                del self.examples[position]
        if self.epoch == 0 and self.consumed == 0:
            raise ValueError("train_dataset has no examples. Give at least one.")

    def _size(self, windows: Iterator[Window]) -> int:
        """Return the number of examples of the next step.  Read one more, to see whether the epoch continues."""
        if self.slots.batch is None:
            return min(self.batch_size, self.num_read - self.consumed)
        while True:
            ahead = self.num_read - self.consumed
            upcoming_N = torch.arange(self.consumed, self.num_read)
            size = max(int(self.slots.batch.batch(upcoming_N, self.batch_size)), 1)
            # Ask again if the owner would take all that it has seen: it may want more.
            if size < ahead or self._read_ahead(windows, 2 * ahead) == ahead:
                return min(size, ahead)

    def _read_ahead(self, windows: Iterator[Window], number: int) -> int:
        """Read until this number of examples is ahead, or the stream ends; return how many are ahead."""
        while self.num_read - self.consumed < number and not self.ended:
            if (window := next(windows, None)) is None:
                self.ended = True
                break
            if window.state is not None:
                self._starts.append((window.position, window.state))
            for position, example in enumerate(window.examples, window.position):
                if position >= self.consumed - 1:  # earlier examples are only skipped
                    self.examples[position] = example
            self.num_read = window.position + len(window.examples)
        return max(self.num_read - self.consumed, 0)

    def _windows_from(self, position: int, state: dict[str, Any] | None) -> Iterator[Window]:
        self.windows.epoch, self.windows.start = self.epoch, (position, state)
        self.examples.clear()
        self._starts = deque([(position, state)])
        self.num_read, self.ended = position, False
        return iter(self.loader)

    def _windows_where_it_stopped(self) -> Iterator[Window]:
        """Return the windows from the one in which the stream stopped."""
        for start in (self._starts[0], (0, None)):
            windows = self._windows_from(*start)
            self._read_ahead(windows, 1)
            before = self.examples.pop(self.consumed - 1, None)
            if before is not None and self._last in (digest(before), ""):  # a plain Trainer saves no hash
                return windows
            if start[0]:
                logger.warning(f"train_dataset: its state is not exact. Reading its first {self.consumed} examples.")
        raise ValueError(
            f"train_dataset: example {self.consumed - 1} of epoch {self.epoch} differs from the one before the "
            "checkpoint. Resume with the same data, in the same order."
        )

    @property
    def epoch_is_over(self) -> bool:
        """Return whether every example of this epoch was consumed."""
        return self.ended and self.consumed >= self.num_read

    @property
    def epochs(self) -> float:
        """Return the position in the data, in epochs."""
        if self.epoch_is_over:
            return self.epoch + 1.0
        try:
            num_examples = len(self) * self.batch_size
        except TypeError:
            num_examples = self.nominal_examples
        return self.epoch + min(self.consumed / num_examples, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, and where to start reading to continue from there."""
        position, state = self._starts[0]
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "seed": self.seed,
            "num_examples": None,
            "over": self.epoch_is_over,
            "start": {"position": position, "state": state},
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position that `state_dict` returned."""
        if "start" not in state:
            raise ValueError(
                f"train_dataset ({type(self.dataset).__name__}) has no index, but the checkpoint's had one. "
                "Resume with the same data."
            )
        self.epoch, self.consumed, self.seed = state["epoch"], state["consumed"], state["seed"]
        self.windows.seed = self.seed
        self.num_read, self.ended = self.consumed, state["over"]
        self._starts = deque([(state["start"]["position"], state["start"]["state"])])
        self._last = state["last"]


def _window_as_it_is(window: Window) -> Window:
    return window
