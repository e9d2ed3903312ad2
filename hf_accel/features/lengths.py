"""Measure the lengths of the examples of a training set.

Shape suffixes: ``N`` examples, ``R`` rows: one for each example, or one for each choice of a multiple-choice example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_accel.features.columns import column_names, columns_in_chunks
from hf_accel.technique import Technique

CHUNK = 1000
"""Examples to read at once."""

LONGEST = 2**40
"""Largest supported length, so that sums over a training set fit into 64 bits."""


class Lengths(NamedTuple):
    """Lengths of examples: int64, or float64 where a column of lengths holds fractions, such as seconds."""

    longest_N: Tensor
    """Tokens of an example's longest row, without the padding that its ``attention_mask`` hides."""
    tokens_N: Tensor
    """Tokens of all rows of an example."""
    width_N: Tensor
    """Positions of an example's longest row, padding included."""
    rows_N: Tensor
    """Number of an example's rows."""


def example_lengths(dataset: Any, *columns: str, asking: Technique, remedy: str) -> Lengths:
    """Measure each example by the first existing one of ``columns``, which holds token ids or lengths.

    ``remedy`` ends the error about missing columns.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{asking!r} does not support {type(dataset).__name__} as train_dataset because its lengths are unknown "
            f"before they are read. {remedy}"
        )
    found = column_names(dataset, asking)
    column = next((column for column in columns if column in found), None)
    if column is None:
        raise ValueError(
            f"{asking!r}: train_dataset has no column {' or '.join(map(repr, columns))}, only "
            f"{', '.join(map(repr, found))}. {remedy}"
        )
    parts: list[Lengths] = []
    for values, mask in _chunks(dataset, column, found, asking):
        if _is_list(values.type):
            part = _of_rows(values, mask, column, asking)
        else:
            numbers_N = _whole(_numbers(values, column, asking))
            part = Lengths(numbers_N, numbers_N, numbers_N, torch.ones(len(values), dtype=torch.int64))
        parts.append(part)
    return Lengths(*(torch.cat(column) for column in zip(*parts, strict=True)))


def token_rows(dataset: Any, asking: Technique) -> Iterator[np.ndarray]:
    """Read the token ids of each example, (tokens,), without the padding that its ``attention_mask`` hides."""
    for values, mask in _chunks(dataset, "input_ids", column_names(dataset, asking), asking):
        ids_T, lengths_R, example_R = _flat(values, "input_ids", asking)
        example_T = example_R.repeat_interleave(lengths_R)
        if (seen_T := _seen(mask, lengths_R)) is not None:
            ids_T, example_T = ids_T.filter(pa.array(seen_T.numpy())), example_T[seen_T]
        borders_N = torch.bincount(example_T, minlength=len(values)).cumsum(0)[:-1]
        yield from np.split(ids_T.to_numpy(zero_copy_only=False), borders_N.tolist())


def padding_share(lengths: Lengths, ids_N: Tensor, batch_size: int) -> float:
    """Return the share of padding if consecutive batches are padded to their longest row."""
    batches = ids_N.split(batch_size)
    positions = sum(float(lengths.width_N[ids].max()) * float(lengths.rows_N[ids].sum()) for ids in batches)
    return 1 - float(lengths.tokens_N[ids_N].sum()) / positions if positions else 0.0


def _chunks(dataset: Any, column: str, found: list[str], asking: Technique) -> Iterator[tuple[pa.Array, Any]]:
    """Read a column in chunks, with ``attention_mask`` if it holds token ids that have one."""
    if column == "input_ids" and "attention_mask" in found:
        for values, mask in columns_in_chunks(dataset, [column, "attention_mask"], asking, CHUNK):
            yield values, mask
    else:
        for (values,) in columns_in_chunks(dataset, [column], asking, CHUNK):
            yield values, None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _flat(values: pa.Array, column: str, asking: Technique) -> tuple[pa.Array, Tensor, Tensor]:
    """Return the items of nested lists, the lengths of the innermost lists, and the example of each, (R,)."""
    example_R = torch.arange(len(values))
    while True:
        lengths_R = torch.tensor(_numbers(pc.call_function("list_value_length", [values]), column, asking)).long()
        values = pc.call_function("list_flatten", [values])
        if not _is_list(values.type):
            return values, lengths_R, example_R
        example_R = example_R.repeat_interleave(lengths_R)


def _of_rows(values: pa.Array, mask: pa.Array | None, column: str, asking: Technique) -> Lengths:
    _, width_R, example_R = _flat(values, column, asking)
    tokens_R = width_R
    if (seen_T := _seen(mask, width_R)) is not None:
        row_T = torch.arange(len(width_R)).repeat_interleave(width_R)
        tokens_R = torch.bincount(row_T[seen_T], minlength=len(width_R))
    none_N = torch.zeros(len(values), dtype=torch.int64)
    return Lengths(
        none_N.scatter_reduce(0, example_R, tokens_R, "amax"),
        none_N.scatter_add(0, example_R, tokens_R),
        none_N.scatter_reduce(0, example_R, width_R, "amax"),
        torch.bincount(example_R, minlength=len(values)),
    )


def _seen(mask: Any, lengths_R: Tensor) -> Tensor | None:
    """Return the items that an attention mask shows; None if it does not belong to the same rows."""
    if mask is None or mask.null_count or not _is_list(mask.type):
        return None
    while _is_list(mask.type):
        mask = pc.call_function("list_flatten", [mask])
    if len(mask) != int(lengths_R.sum()) or not pa.types.is_primitive(mask.type):
        return None
    return torch.tensor(mask.to_numpy(zero_copy_only=False).astype(bool))


def _numbers(values: pa.Array, column: str, asking: Technique) -> np.ndarray:
    """Check that all values are lengths, from 0 to `LONGEST`; return them as float64."""
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"{asking!r} does not support the column {column!r} because it holds {kind}. Use a column of lengths."
        )
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    wrong = ~((numbers >= 0) & (numbers <= LONGEST))  # None is nan
    if wrong.any():
        raise ValueError(
            f"{asking!r} does not support {values[int(wrong.argmax())].as_py()!r} as a length in the column "
            f"{column!r}. Correct or remove such examples."
        )
    return numbers


def _whole(numbers: np.ndarray) -> Tensor:
    return torch.tensor(numbers.astype(np.int64) if (numbers == numbers.round()).all() else numbers)
