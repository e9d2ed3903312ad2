"""Examples cut to a length: to their beginnings, or into pieces that become examples of their own.

Shape suffixes: ``R`` rows of a batch, ``L`` positions, ``B`` examples; a row holds several examples where these are
packed (with ``position_ids`` that begin anew within a row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_accel.batch import MicroBatch
from hf_accel.losses import IGNORED, examples_of


def truncate(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The first ``length`` tokens of each example, in every tensor that begins with the shape of ``input_ids``.

    Padding on the left stays there; examples that are packed are truncated one by one, and what is left of a row is
    moved to its left.  Where no label to predict would be left, the inputs stay whole.
    """
    ids_RL = inputs["input_ids"]
    mask_RL = inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
    if (used_RL := _used_of_packed(inputs, mask_RL)) is None:
        kept_RL = None
        length = min(length, ids_RL.shape[1])
        first_R = mask_RL.long().argmax(1).clamp(max=ids_RL.shape[1] - length)
        columns_RL = first_R[:, None] + torch.arange(length)
    else:
        kept_RL = (inputs["position_ids"] < length) & used_RL
        columns_RL = (~kept_RL).long().argsort(dim=1, stable=True)[:, : int(kept_RL.sum(1).max())]
    shorter = {
        name: value[torch.arange(len(ids_RL))[:, None], columns_RL] if _by_position(value, ids_RL) else value
        for name, value in inputs.items()
    }
    if kept_RL is not None:
        _refill(shorter, kept_RL.gather(1, columns_RL))
    labels = shorter.get("labels")
    if labels is not None and labels.dim() > 1 and labels[:, 1:].eq(IGNORED).all():
        return dict(inputs)
    return shorter


def rechunk(micro: MicroBatch, length: int) -> MicroBatch:
    """Each example in pieces of ``length`` tokens, the last one shorter; a piece counts as an example with the id and
    the weight of the one that it is of.  Pieces without a label are left out, unless no other is there.

    Attention does not cross from piece to piece, and the first token of a piece is not predicted.
    """
    inputs, ids_RL = micro.inputs, micro.inputs["input_ids"]
    mask_RL = inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
    if (used_RL := _used_of_packed(inputs, mask_RL)) is not None:
        return _rechunk_packed(micro, used_RL, length)
    pieces = -(-ids_RL.shape[1] // length)
    columns_RL = mask_RL.long().argmax(1)[:, None] + torch.arange(pieces * length)
    there_RL = columns_RL < ids_RL.shape[1]
    columns_RL = columns_RL.clamp(max=ids_RL.shape[1] - 1)
    rows = torch.arange(len(ids_RL))[:, None]
    cut = {"attention_mask": mask_RL.to(ids_RL.dtype)} | inputs
    for name, value in cut.items():
        if _by_position(value, ids_RL):
            cut[name] = value[rows, columns_RL].reshape(len(ids_RL) * pieces, length, *value.shape[2:])
        elif isinstance(value, Tensor):
            cut[name] = value.repeat_interleave(pieces, 0)
    there_RL = there_RL.reshape(-1, length)
    cut["attention_mask"] = cut["attention_mask"] * there_RL
    cut["labels"] = cut["labels"].masked_fill(~there_RL, IGNORED)
    if "position_ids" in cut:
        cut["position_ids"] = cut["position_ids"] % length
    taught_R = cut["labels"].ne(IGNORED).any(1)
    kept_R = taught_R if taught_R.any() else torch.arange(len(taught_R)) == 0
    of_R = torch.arange(len(micro.ids_B)).repeat_interleave(pieces)[kept_R]
    kept = {name: value[kept_R] if isinstance(value, Tensor) else value for name, value in cut.items()}
    return _pieces_of(micro, kept, of_R)


def _rechunk_packed(micro: MicroBatch, used_RL: Tensor, length: int) -> MicroBatch:
    """Packed rows keep their shape; positions begin anew with every piece."""
    example_RL = examples_of(micro.inputs, len(micro.ids_B))
    rows = dict(micro.inputs)
    rows["position_ids"] = rows["position_ids"] % length
    _refill(rows, used_RL)
    starts_RL = (rows["position_ids"] == 0) & used_RL
    rows["labels"] = rows["labels"].masked_fill(starts_RL, IGNORED)
    return _pieces_of(micro, rows, example_RL[starts_RL])


def _by_position(value: Any, ids_RL: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == ids_RL.shape


def _pieces_of(micro: MicroBatch, inputs: dict[str, Tensor], of_B: Tensor) -> MicroBatch:
    """A micro-batch of pieces, each of one of the examples of another one."""
    weights_B = None if micro.weights_B is None else micro.weights_B[of_B]
    return MicroBatch(inputs, micro.ids_B[of_B], weights_B)


def _used_of_packed(inputs: Mapping[str, Tensor], mask_RL: Tensor) -> Tensor | None:
    """Where packed rows have tokens; None where no row holds several examples."""
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or positions_RL.shape != mask_RL.shape:
        return None
    # Between the first and the last token, with those that are hidden within an example.
    used_RL = mask_RL.cummax(1).values & mask_RL.flip(1).cummax(1).values.flip(1)
    anew_RL = (positions_RL[:, 1:] <= positions_RL[:, :-1]) & used_RL[:, 1:] & used_RL[:, :-1]
    return used_RL if anew_RL.any() else None


def _refill(rows: dict[str, Tensor], kept_RL: Tensor) -> None:
    """Make padding, which goes on counting the positions, of what packed rows do not keep."""
    last_R1 = kept_RL.sum(1, keepdim=True) - 1
    positions_RL = rows["position_ids"]
    counted_RL = positions_RL.gather(1, last_R1) + torch.arange(kept_RL.shape[1]) - last_R1
    rows["position_ids"] = torch.where(kept_RL, positions_RL, counted_RL)
    if "attention_mask" in rows:
        rows["attention_mask"] = rows["attention_mask"] * kept_RL
    for name, fill in {"input_ids": 0, "labels": IGNORED}.items():
        if name in rows:
            rows[name] = rows[name].masked_fill(~kept_RL, fill)
