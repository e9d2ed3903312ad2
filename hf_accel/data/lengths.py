"""How long the examples of a training set are."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor


def example_lengths(dataset: Any, column: str | None = None) -> Tensor:
    """Length of each example; (N,).

    ``column`` holds sequences, or their lengths as whole numbers; None: ``length`` where it exists, else ``input_ids``.
    """
    in_arrow = isinstance(dataset, datasets.Dataset)
    columns = dataset.column_names if in_arrow else list(dataset[0])
    column = column or ("length" if "length" in columns else "input_ids")
    if column not in columns:
        raise ValueError(
            f"train_dataset: it has no column {column!r}, only {', '.join(map(repr, columns))}. "
            "Tokenise it before training, or name the column that tells lengths."
        )
    if in_arrow:
        chunks = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
        return torch.cat([_arrow_lengths(chunk[column]) for chunk in chunks])
    values = [dataset[i][column] for i in range(len(dataset))]
    return torch.tensor([int(value) if torch.as_tensor(value).dim() == 0 else len(value) for value in values])


def _arrow_lengths(values: pa.ChunkedArray) -> Tensor:
    return torch.tensor(
        (values if pa.types.is_integer(values.type) else pc.list_value_length(values)).to_numpy()
    ).long()


def padding_share(lengths_N: Tensor, batch_size: int) -> float:
    """Share of the positions that is padding when consecutive batches are padded to their longest example."""
    batches = lengths_N.split(batch_size)
    return 1 - float(lengths_N.sum()) / sum(float(batch.max()) * len(batch) for batch in batches)
