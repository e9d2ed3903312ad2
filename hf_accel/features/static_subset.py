"""Leave out examples for a whole run: the base class of the techniques that do so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
from torch import Tensor
from torch.utils.data import Dataset

from hf_accel.features.columns import check_indexable
from hf_accel.technique import Technique


class Rows(Dataset):
    """Some rows of another data set, read one by one, so that each has its own random key."""

    def __init__(self, dataset: Any, ids_N: Tensor):
        self.dataset, self.ids = dataset, ids_N.tolist()
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.ids[index]]


def rows_of(dataset: Any, ids_N: Tensor) -> Any:
    """Take the rows with these ids; a table stays a table."""
    return dataset.select(ids_N.tolist()) if isinstance(dataset, datasets.Dataset) else Rows(dataset, ids_N)


class StaticSubset(Technique):
    """Train on the examples that `choose` names once, before training."""

    counters: ClassVar = ("ids_N", "offered")

    def choose(self, dataset: Any) -> Tensor:
        """Return the ids of the kept examples, ascending."""
        raise NotImplementedError

    def prepare_dataset(self, dataset: Any) -> Any:
        """Choose the examples; a resumed run keeps the choice of its checkpoint, because its model has changed."""
        check_indexable(dataset, self)
        assert self.run_ is not None
        if (state := self.run_.resumed_state(self)) is None:
            self.offered_, self.ids_N_ = len(dataset), self.choose(dataset)
        else:
            self.load_state_dict("global", state)
        if self.offered_ != len(dataset):
            raise ValueError(
                f"{self!r} chose from {self.offered_} examples before the checkpoint, but train_dataset has "
                f"{len(dataset)} now. Resume with the same data."
            )
        return dataset if len(self.ids_N_) == len(dataset) else rows_of(dataset, self.ids_N_)

    def report(self) -> Mapping[str, Any]:
        """Report the kept share of the examples."""
        return {"kept": len(self.ids_N_) / self.offered_, "examples": len(self.ids_N_)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
