"""Count the examples, tokens and positions of a batch; None if its structure does not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.trainer_utils import has_length

from hf_accel.batch import named_tensors
from hf_accel.host.view import MAKERS_OF_LOADERS, TrainerView


def num_examples(batch: Any) -> int | None:
    """Return the number of examples of a batch, according to its structure.

    The first column with a length tells.  Columns are the values of a mapping, or the entries of a tuple or of a list
    of tensors.  Any other list holds one example per entry.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        columns: Any = batch.values()
    elif isinstance(batch, tuple) or (isinstance(batch, list) and all(isinstance(v, Tensor) for v in batch)):
        columns = batch
    else:
        return len(batch) if isinstance(batch, list) else None
    return next((n for column in columns if (n := _num_rows(column)) is not None), None)


def _num_rows(column: Any) -> int | None:
    return len(column) if isinstance(column, list | tuple) and column else num_examples(column)


def num_tokens(batch: Any, main_input: str) -> Tensor | int | None:
    """Return the number of tokens that the attention masks keep, or else the size of the main input."""
    masks = [v for name, v in named_tensors(batch) if name.endswith("attention_mask") and v.dim() in (1, 2)]
    if masks:
        return sum(mask.sum() for mask in masks)
    values = [v for name, v in named_tensors(batch) if name == main_input]
    if not values or any(v.is_floating_point() for v in values):
        return None
    return sum(v.numel() for v in values)


def num_positions(batch: Any, main_input: str) -> int:
    """Return the size of the main input, including padding: positions of text, pixels of images; 0 without one."""
    return sum(v.numel() for name, v in named_tensors(batch) if name == main_input)


class LoaderCounter:
    """Count the examples that Trainer's own loader draws, before any collator.

    A collator may pack several examples into a row or split one into several, so its batches do not tell.

    Args:
        batch_size: Examples of a batch over all ranks.
        length: Examples of an epoch.
    """

    def __init__(self, batch_size: int, length: int):
        self.batch_size, self.length, self.drawn = batch_size, length, 0

    def begin_epoch(self, batches: int) -> None:
        """Begin an epoch; an earlier process has read the given number of its batches."""
        self.drawn = batches * self.batch_size

    def count(self, batches: Sequence[Any]) -> int:
        """Return the number of examples in the next batches."""
        size = max(min(len(batches) * self.batch_size, self.length - self.drawn), 0)
        self.drawn += size
        return size


def loader_counter(host: TrainerView) -> LoaderCounter | None:
    """Return a counter for Trainer's own loader, or None if the trainer makes another or batch sizes vary."""
    own = any(host.overrides(name) for name in MAKERS_OF_LOADERS)
    varied = host.args.train_sampling_strategy not in ("random", "sequential", "group_by_length")
    if own or varied or not has_length(host.train_dataset):
        return None
    return LoaderCounter(host.train_batch_size * host.args.world_size, len(host.train_dataset))


def samples_of(batches: Sequence[Any], counter: LoaderCounter | None, world_size: int) -> int | None:
    """Return the number of examples in the batches of an update over all ranks, or None if it is unknown."""
    if counter is not None:
        return counter.count(batches)
    total = 0
    for batch in batches:
        if (rows := num_examples(batch)) is None:
            return None
        total += rows
    return total * world_size
