"""Read and collate the examples of a step.

Shape suffix: ``B`` examples of a micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hf_accel.batch import ORDER, MicroBatch, StepBatch, StepPlan
from hf_accel.preserve import keyed_random, seed_all


class StepReader(Dataset):
    """Read and collate the examples of a plan; runs in loader workers.

    Random transforms and collators draw from generators keyed by (seed, epoch, first example, its repeats), and the
    global ones keep their state.  So the result does not depend on workers, prefetching or draws of the model.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]]):
        self.dataset, self.epoch = dataset, 0
        # Read rows at once if the data set can, unless a transform may draw: each example then needs its own key.
        self.reads_rows = hasattr(dataset, "__getitems__") and not _has_transform(dataset)
        self.collate = CopyingCollator(collate)

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        if plan.epoch != self.epoch and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(plan.epoch)  # a persistent worker has its own copy
        self.epoch = plan.epoch
        with keyed_random():
            return StepBatch(plan, [self._read(plan, *columns) for columns in plan.micro_batches()])

    def _read(self, plan: StepPlan, ids_B: Tensor, weights_B: Tensor | None, repeats_B: Tensor | None) -> MicroBatch:
        repeats = [0] * len(ids_B) if repeats_B is None else repeats_B.tolist()
        ids = [i if i >= 0 else int(plan.ids_N[0]) for i in ids_B.tolist()]
        if self.reads_rows:
            features = self.dataset.__getitems__(ids)
        else:
            features = []
            for i, repeat in zip(ids, repeats, strict=True):
                seed_all(plan.seed, plan.epoch, i, repeat)
                features.append(self.dataset[i])
        seed_all(plan.seed, plan.epoch, ids[0], repeats[0])
        inputs: Any = self.collate(features)
        micro = MicroBatch(inputs, ids_B, weights_B, repeats_B)
        if not isinstance(inputs, Mapping) or ORDER not in inputs:
            return micro
        inputs = dict(inputs)
        return micro.of(inputs, inputs.pop(ORDER))


class CopyingCollator:
    """Collate copies of the examples, because a collator may change them; other attributes are the collator's.

    The same examples may be read again: in smaller micro-batches, to score them, or in a short run.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, features: list[Any]) -> Any:
        return self.collate([_copied(example) for example in features])

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # before it is unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)


def _copied(value: Any) -> Any:
    """Return a copy of nested mappings and lists."""
    if isinstance(value, MutableMapping):
        value = copy.copy(value)
        for name in value:
            value[name] = _copied(value[name])
    elif isinstance(value, list):
        value = [_copied(item) for item in value] if value and isinstance(value[0], dict | list) else value.copy()
    return value


def _has_transform(dataset: Any) -> bool:
    if isinstance(dataset, Subset):
        return not isinstance(dataset.dataset, datasets.Dataset) or _has_transform(dataset.dataset)
    return getattr(dataset, "format", {}).get("type") == "custom"
