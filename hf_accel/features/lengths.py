"""How long the examples of a training set are."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_accel.technique import Technique


def example_lengths(dataset: Any, *columns: str, asking: Technique, remedy: str) -> Tensor:
    """Length of each example, from the first of ``columns`` that exists: of sequences, or of their lengths; (N,).

    ``remedy`` says what to do where there is none.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{asking!r}: how long the examples of train_dataset ({type(dataset).__name__}) are is not known before "
            f"they are read. {remedy}"
        )
    in_arrow = isinstance(dataset, datasets.Dataset)
    found = dataset.column_names if in_arrow else list(dataset[0])
    column = next((column for column in columns if column in found), None)
    if column is None:
        raise ValueError(
            f"{asking!r}: train_dataset has no column {' or '.join(map(repr, columns))}, only "
            f"{', '.join(map(repr, found))}. {remedy}"
        )
    if in_arrow:
        chunks: Any = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
        return torch.cat([_arrow_lengths(chunk[column]) for chunk in chunks])
    values = [dataset[i][column] for i in range(len(dataset))]
    return torch.tensor([int(value) if torch.as_tensor(value).dim() == 0 else len(value) for value in values])


def _arrow_lengths(values: pa.ChunkedArray) -> Tensor:
    return torch.tensor(
        (values if pa.types.is_integer(values.type) else pc.call_function("list_value_length", [values])).to_numpy()
    ).long()


def padding_share(lengths_N: Tensor, batch_size: int) -> float:
    """Share of the positions that is padding when consecutive batches are padded to their longest example."""
    batches = lengths_N.split(batch_size)
    return 1 - float(lengths_N.sum()) / sum(float(batch.max()) * len(batch) for batch in batches)
