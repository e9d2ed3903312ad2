"""Prepare the training set of a run, and make a stream of step batches from it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset

from hf_accel.engine.meter import Meter
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView
from hf_accel.stream.indexed import Slots, StepStream
from hf_accel.stream.iterable import IterableStepStream


@contextlib.contextmanager
def prepared_dataset(host: TrainerView, roster: Roster, meter: Meter) -> Iterator[None]:
    """Give the trainer the training set that the techniques prepare; restore the original on exit."""
    given = host.train_dataset
    try:
        for technique in roster.with_hook("prepare_dataset"):
            with meter.charge(technique):
                host.train_dataset = technique.prepare_dataset(host.train_dataset)
        for technique in roster.with_hook("inspect_dataset"):
            with meter.charge(technique):
                technique.inspect_dataset(host.train_dataset)
        yield
    finally:
        host.train_dataset = given


def without_unused_columns(host: TrainerView, dataset: Any) -> tuple[Any, Callable]:
    """Return a data set and its collator; one of them removes the columns that the model does not take."""
    if isinstance(dataset, datasets.Dataset):
        return host.remove_unused_columns(dataset, description="training"), host.data_collator
    return dataset, host.get_collator_with_removed_columns(host.data_collator, description="training")


def stream_of(host: TrainerView, roster: Roster, dataset: Any, batch_size: int, micro_batch_size: int) -> StepStream:
    """Return the stream of a data set.

    Args:
        batch_size: Examples of an update over all ranks.
        micro_batch_size: Examples of one forward pass on one rank.
    """
    args = host.args
    dataset, collator = without_unused_columns(host, dataset)
    kind: Any = StepStream
    if isinstance(dataset, IterableDataset):
        nominal_examples = args.max_steps * batch_size if args.max_steps > 0 else math.inf
        kind = functools.partial(IterableStepStream, nominal_examples=nominal_examples)
    return kind(
        dataset,
        collator,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        # accelerate seeds Trainer's own order in the same way.
        seed=args.data_seed if args.data_seed is not None else torch.random.initial_seed(),
        rank=args.process_index,
        world=args.world_size,
        sequential=args.train_sampling_strategy == "sequential",
        drop_last=args.dataloader_drop_last,
        loader_batch_size=host.train_batch_size * args.world_size,
        slots=Slots(**{slot: roster.owner(slot) for slot in ("select", "order", "batch", "collate")}),
        loader={
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        },
    )
