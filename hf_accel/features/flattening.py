"""Lay examples end to end in one row, as the user's collator makes each.

Shape suffixes: ``R`` rows, ``L`` positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_accel.host.internals import attention_of
from hf_accel.technique import Technique


class Layout(NamedTuple):
    """Layout of the examples of a row, in which a model trains on them as on separate examples."""

    first: int = 0
    """Position of an example's first token."""
    shift: bool = True
    """True if each token predicts the next one, so that none predicts the first one of an example."""
    masked: bool = False
    """True if the model needs `tell_apart`, because it ignores restarting ``position_ids``."""


CAUSAL = Layout()


def unpadded(
    examples: Sequence[Mapping[str, Tensor]], asking: Technique, layout: Layout = CAUSAL
) -> list[dict[str, Tensor]]:
    """Remove the positions that an ``attention_mask`` hides from examples, rows (1, L) each; add ``position_ids``."""
    rows = []
    for example in examples:
        if (ids_1L := example.get("input_ids")) is None:
            raise ValueError(
                f"{asking!r} needs input_ids in the batch ({', '.join(example)}). Remove {type(asking).__name__}."
            )
        if len(ids_1L) != 1:
            raise ValueError(
                f"{asking!r} does not support collators that make {len(ids_1L)} rows of one example because the rows "
                f"belong together. Remove {type(asking).__name__}."
            )
        seen_1L = example.get("attention_mask", torch.ones_like(ids_1L)).bool()
        row = {"position_ids": layout.first + torch.arange(int(seen_1L.sum()))[None]}
        for name, value in example.items():
            if name == "attention_mask":
                continue
            if value.shape != ids_1L.shape:
                raise ValueError(
                    f"{asking!r} does not support {name!r} of shape {tuple(value.shape)} because input_ids have shape "
                    f"{tuple(ids_1L.shape)}. Drop it from the data or remove {type(asking).__name__}."
                )
            row[name] = value[seen_1L][None]
        if "labels" in row and layout.shift:
            row["labels"][:, :1] = -100  # no example predicts the first token of the next
        rows.append(row)
    return rows


def end_to_end(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join rows to one row, (1, T)."""
    return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}


_handles: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def tell_apart(model: nn.Module) -> None:
    """Give a model without ``attention_mask`` the one that follows from ``position_ids``, from now on."""
    if model not in _handles:
        _handles[model] = model.register_forward_pre_hook(_with_mask, with_kwargs=True)


def stop_telling_apart(model: nn.Module) -> None:
    """Undo `tell_apart`."""
    if (handle := _handles.pop(model, None)) is not None:
        handle.remove()


def _with_mask(model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or inputs.get("attention_mask") is not None:
        return None
    example_RL = F.pad(positions_RL[:, 1:] <= positions_RL[:, :-1], (1, 0)).cumsum(1)
    mask = (example_RL[:, :, None] == example_RL[:, None, :])[:, None]
    if attention_of(model) == "eager":  # adds it to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return args, inputs | {"attention_mask": mask}
