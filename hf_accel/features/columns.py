"""Read columns of a training set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_accel.technique import Technique


def check_indexable(dataset: Any, asking: Technique) -> None:
    """Raise ValueError unless examples have an index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and has_length(dataset)):
        raise ValueError(
            f"{asking!r} does not support {type(dataset).__name__} as train_dataset because it chooses examples by "
            "index. Use a data set with __len__ and __getitem__."
        )


def column_names(dataset: Any, asking: Technique) -> list[str]:
    """List the columns of a data set."""
    check_indexable(dataset, asking)
    if _in_arrow(dataset):
        return dataset.column_names
    if not isinstance(first := dataset[0], Mapping):
        raise ValueError(f"{asking!r} does not support examples that are {type(first).__name__}s. Use mappings.")
    return list(first)


def columns_in_chunks(dataset: Any, names: Sequence[str], asking: Technique, rows: int) -> Iterator[list[pa.Array]]:
    """Read several columns in chunks of ``rows`` examples."""
    found = column_names(dataset, asking)
    for name in set(names) - set(found):
        raise ValueError(
            f"{asking!r}: train_dataset has no column {name!r}, only {', '.join(map(repr, found))}. Use one of these."
        )
    if _in_arrow(dataset):
        chunks: Any = dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=rows)
        for chunk in chunks:
            yield [_storage(chunk[name].combine_chunks()) for name in names]
        return
    for start in range(0, len(dataset), rows):
        examples = [dataset[i] for i in range(start, min(start + rows, len(dataset)))]
        yield [_array([example.get(name) for example in examples], name, asking) for name in names]


def _in_arrow(dataset: Any) -> bool:
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"  # a transform makes columns


def _storage(values: pa.Array) -> pa.Array:
    return values.storage if isinstance(values, pa.ExtensionArray) else values


def _array(values: list[Any], name: str, asking: Technique) -> pa.Array:
    try:
        return pa.array([v.tolist() if isinstance(v, Tensor | np.ndarray | np.generic) else v for v in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{asking!r} cannot read the column {name!r}: {error}. Use values of one type.") from None


def column_chunks(dataset: Any, name: str, asking: Technique, rows: int = 10_000) -> Iterator[pa.Array]:
    """Read a column in chunks of ``rows`` examples."""
    return (values for (values,) in columns_in_chunks(dataset, [name], asking, rows))


def column(dataset: Any, name: str, asking: Technique) -> list[Any]:
    """Read the values of a column."""
    return [value for chunk in column_chunks(dataset, name, asking) for value in chunk.to_pylist()]


def numbers(dataset: Any, name: str, asking: Technique) -> Tensor:
    """Read a column of numbers, float64; None becomes nan."""
    values = column(dataset, name, asking)
    for value in values:
        if not isinstance(value, int | float | None):
            raise ValueError(
                f"{asking!r} does not support {value!r} in the column {name!r} because it is not a number. Use numbers."
            )
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
