"""Cut examples to a length: to their beginnings, or into pieces that become examples.

Shape suffixes: ``R`` rows of a batch, ``L`` positions, ``B`` examples.  A packed row holds several examples, and its
``position_ids`` restart with each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel.batch import MicroBatch
from hf_accel.features.choices import folded
from hf_accel.losses import IGNORED, examples_of
from hf_accel.technique import Technique

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Inputs that tell kernels where the examples of a row begin; a cut makes them again from ``position_ids``."""

BY_PAIRS = ("perm_mask", "target_mapping")
"""Inputs of XLNet for pairs of positions."""


def check_cuttable(inputs: Mapping[str, Any], asking: Technique) -> None:
    """Raise ValueError if a cut would leave parts of the removed tokens in other inputs."""
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("labels") is None:
        raise ValueError(
            f"{asking!r} does not support batches without input_ids and labels ({', '.join(inputs)}) because a cut "
            f"might remove answers or differ from a reference model's text. Remove {type(asking).__name__}."
        )
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or (name in BORDERS and "position_ids" in inputs):
            continue
        aligned = value.shape == ids.shape if name == "attention_mask" else not value.dim() or len(value) == len(ids)
        if name in (*BORDERS, *BY_PAIRS) or not aligned:
            raise ValueError(
                f"{asking!r} does not support {name} of shape {tuple(value.shape)} because it cannot be cut along with "
                f"input_ids of shape {tuple(ids.shape)}. Remove {type(asking).__name__}."
            )


def refuse_media_tokens(asking: Technique, model: Any) -> None:
    """Raise ValueError if tokens stand for images or sounds, so that none of them may be missing."""
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{key}" for kind in ("image", "video", "audio") for key in ("id", "index")]
    if (name := next((name for name in names if getattr(config, name, None) is not None), None)) is not None:
        raise ValueError(
            f"{asking!r} does not support {type(model).__name__} because each {name} in a text stands for a part of an "
            f"image or a sound. Train the text model alone or remove {type(asking).__name__}."
        )


def truncate(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Keep the first ``length`` tokens of each example, in every tensor with the leading shape of ``input_ids``.

    Padding on the left stays there.  Packed examples and choices are truncated one by one, and the rest of a packed row
    moves to its left.  If no label to predict would remain, the inputs stay whole.
    """
    if (shape := inputs["input_ids"].shape)[2:]:
        shorter = truncate(folded(inputs), length)
        return {
            name: value.unflatten(0, shape[:2]) if value is not inputs[name] else value
            for name, value in shorter.items()
        }
    ids_RL = inputs["input_ids"]
    mask_RL = inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
    if (used_RL := _used_of_packed(inputs, mask_RL)) is None:
        kept_RL = None
        length = min(length, ids_RL.shape[1])
        first_R = mask_RL.long().argmax(1).clamp(max=ids_RL.shape[1] - length)
        columns_RL = first_R[:, None] + torch.arange(length)
    else:
        kept_RL = (inputs["position_ids"] - _first(inputs, used_RL) < length) & used_RL
        columns_RL = (~kept_RL).long().argsort(dim=1, stable=True)[:, : int(kept_RL.sum(1).max())]
    shorter = {
        name: value[torch.arange(len(ids_RL))[:, None], columns_RL] if _by_position(name, value, ids_RL) else value
        for name, value in inputs.items()
    }
    if kept_RL is not None:
        _refill(shorter, kept_RL.gather(1, columns_RL))
    labels = shorter.get("labels")
    if labels is not None and labels.dim() > 1 and labels[:, 1:].eq(IGNORED).all():
        return dict(inputs)
    return _with_borders(shorter)


def rechunk(micro: MicroBatch, length: int, shift: bool = True) -> MicroBatch:
    """Cut each example into pieces of ``length`` tokens, the last one shorter.

    A piece counts as an example with the id and the weight of its source.  Pieces without a label are dropped, unless
    all are.  Attention does not cross from piece to piece.  With ``shift``, each token predicts the next one, and
    nothing predicts the first token of a piece.
    """
    inputs, ids_RL = micro.inputs, micro.inputs["input_ids"]
    mask_RL = inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
    if (used_RL := _used_of_packed(inputs, mask_RL)) is not None:
        return _rechunk_packed(micro, used_RL, length, shift)
    pieces = -(-ids_RL.shape[1] // length)
    columns_RL = mask_RL.long().argmax(1)[:, None] + torch.arange(pieces * length)
    there_RL = columns_RL < ids_RL.shape[1]
    columns_RL = columns_RL.clamp(max=ids_RL.shape[1] - 1)
    rows = torch.arange(len(ids_RL))[:, None]
    cut = {"attention_mask": mask_RL.to(ids_RL.dtype)} | inputs
    for name, value in cut.items():
        if _by_position(name, value, ids_RL):
            cut[name] = value[rows, columns_RL].reshape(len(ids_RL) * pieces, length, *value.shape[2:])
        elif isinstance(value, Tensor) and name not in BORDERS:
            cut[name] = value.repeat_interleave(pieces, 0)
    there_RL = there_RL.reshape(-1, length)
    cut["attention_mask"] = cut["attention_mask"] * there_RL
    cut["labels"] = cut["labels"].masked_fill(~there_RL, IGNORED)
    if "position_ids" in cut:
        cut["position_ids"] = cut["position_ids"] % length
    taught_R = cut["labels"].ne(IGNORED).any(1)
    kept_R = taught_R if taught_R.any() else torch.arange(len(taught_R)) == 0
    of_R = torch.arange(len(micro.ids_B)).repeat_interleave(pieces)[kept_R]
    kept = {
        name: value[kept_R] if isinstance(value, Tensor) and name not in BORDERS else value
        for name, value in cut.items()
    }
    return micro.of(_with_borders(kept), of_R)


def _rechunk_packed(micro: MicroBatch, used_RL: Tensor, length: int, shift: bool) -> MicroBatch:
    """Keep the shape of packed rows, and restart their positions with every piece."""
    example_RL = examples_of(micro.inputs, len(micro.ids_B))
    rows = dict(micro.inputs)
    first = _first(rows, used_RL)
    rows["position_ids"] = (rows["position_ids"] - first) % length + first
    _refill(rows, used_RL)
    starts_RL = (rows["position_ids"] == first) & used_RL
    if shift:
        rows["labels"] = rows["labels"].masked_fill(starts_RL, IGNORED)
    return micro.of(_with_borders(rows), example_RL[starts_RL])


def _by_position(name: str, value: Any, ids_RL: Tensor) -> bool:
    """Return whether a tensor has an entry for each position; float labels belong to whole examples."""
    if not isinstance(value, Tensor) or (name == "labels" and value.is_floating_point()):
        return False
    return value.shape[:2] == ids_RL.shape


def _with_borders(rows: dict[str, Any]) -> dict[str, Any]:
    """Make the `BORDERS` of rows again from ``position_ids``, if they have any."""
    if not rows.keys() & {*BORDERS}:
        return rows
    positions_RL = rows["position_ids"]
    starts_RL = torch.ones_like(positions_RL, dtype=torch.bool)
    starts_RL[:, 1:] = positions_RL[:, 1:] <= positions_RL[:, :-1]
    borders = F.pad(starts_RL.flatten().nonzero().flatten(), (0, 1), value=starts_RL.numel())
    fresh: dict[str, Any] = {"seq_idx": starts_RL.cumsum(1) - 1}
    for side in "qk":
        fresh[f"cu_seq_lens_{side}"], fresh[f"max_length_{side}"] = borders, borders.diff().max()
    for name in fresh.keys() & rows.keys():
        given = rows[name]
        rows[name] = fresh[name].to(given) if isinstance(given, Tensor) else type(given)(fresh[name])
    return rows


def _used_of_packed(inputs: Mapping[str, Tensor], mask_RL: Tensor) -> Tensor | None:
    """Mark the tokens of packed rows, or return None if no row holds several examples."""
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or positions_RL.shape != mask_RL.shape:
        return None
    # From the first to the last token, including hidden ones within an example.
    used_RL = mask_RL.cummax(1).values & mask_RL.flip(1).cummax(1).values.flip(1)
    anew_RL = (positions_RL[:, 1:] <= positions_RL[:, :-1]) & used_RL[:, 1:] & used_RL[:, :-1]
    return used_RL if anew_RL.any() else None


def _first(inputs: Mapping[str, Tensor], used_RL: Tensor) -> int:
    """Return the position of an example's first token: 0, or 2 and more in models such as RoBERTa."""
    first = int(inputs["position_ids"][used_RL].min())
    return first if first > 1 else 0


def _refill(rows: dict[str, Tensor], kept_RL: Tensor) -> None:
    """Turn the dropped part of packed rows into padding, with positions that continue the count."""
    last_R1 = kept_RL.sum(1, keepdim=True) - 1
    positions_RL = rows["position_ids"]
    counted_RL = positions_RL.gather(1, last_R1) + torch.arange(kept_RL.shape[1]) - last_R1
    rows["position_ids"] = torch.where(kept_RL, positions_RL, counted_RL)
    if "attention_mask" in rows:
        rows["attention_mask"] = rows["attention_mask"] * kept_RL
    for name, fill in {"input_ids": 0, "labels": IGNORED}.items():
        if name in rows:
            rows[name] = rows[name].masked_fill(~kept_RL, fill)
