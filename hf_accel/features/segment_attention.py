"""Attention of each example of a row by itself, where ``position_ids`` say that there are several.

The mask that ``sdpa`` makes of such a row, (T, T), hides what one example would see of another, but its scores are
computed all the same: T^2, where the examples need the sum of their squares.  On CPUs it is cheaper to visit them one
by one, as the kernels of flash attention do:

    softmax(q_e k_e^T / sqrt(d)) v_e      for every example e

Registered with ``transformers`` as an attention implementation of its own; rows with an ``attention_mask``, windows and
whatever else ``sdpa`` makes a mask for are left to it.

Shape suffixes: ``R`` rows, ``H`` heads, ``T`` positions, ``D`` sizes of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_accel.features.flattening import flattening_fault

NAME = "sdpa_by_segment"

_segments = WeakTensorKeyDictionary()
"""Lengths of the examples of each row, by the ``position_ids`` that all blocks of a model are given."""


def segment_lengths(position_ids_RT: Tensor) -> list[list[int]] | None:
    """Lengths of the examples of each row; None where no row has several."""
    if position_ids_RT not in _segments:
        starts_RT = torch.ones_like(position_ids_RT, dtype=torch.bool)
        starts_RT[:, 1:] = position_ids_RT[:, 1:] <= position_ids_RT[:, :-1]
        lengths = []
        for row in starts_RT.cpu():
            borders = [*row.nonzero().flatten().tolist(), len(row)]
            lengths.append([end - start for start, end in pairwise(borders)])
        _segments[position_ids_RT] = lengths if any(len(row) > 1 for row in lengths) else None
    return _segments[position_ids_RT]


def attention(
    module: nn.Module,
    query_RHTD: Tensor,
    key_RHTD: Tensor,
    value_RHTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``sdpa`` gives, (R, T, H, D); the signature is of `transformers.AttentionInterface`."""
    lengths = None
    if attention_mask is None and position_ids is not None and position_ids.shape[0] == len(query_RHTD):
        lengths = segment_lengths(position_ids)
    if lengths is None:
        return sdpa_attention_forward(module, query_RHTD, key_RHTD, value_RHTD, attention_mask, **kwargs)
    rows = []
    for row, *of_row in zip(lengths, query_RHTD.split(1), key_RHTD.split(1), value_RHTD.split(1), strict=True):
        segments = zip(*(tensor.split(row, dim=2) for tensor in of_row), strict=True)
        rows.append(torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in segments], 1))
    return torch.cat(rows), None


def mask(q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None where nothing but the borders of examples is to be hidden; else that of ``sdpa``."""
    window = kwargs.get("local_size")
    if (
        attention_mask is None
        and q_length == kv_length
        and not kwargs["use_vmap"]
        and (window or kv_length) >= kv_length
    ):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def attend_by_segment(model: Any) -> None:
    """From now on, in a model that `can_attend_by_segment`."""
    model.set_attn_implementation(NAME)


def attend_as_before(model: Any) -> None:
    """Undo `attend_by_segment`, where it was done."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def can_attend_by_segment(model: Any, num_rows: int = 1, run: Any = None) -> bool:
    """Whether a model with ``sdpa`` attention stays on a CPU, where ``run``, the trainer, trains it, and keeps
    examples apart in this way; tried, and undone."""
    config = model.config
    on_cpu = next(model.parameters()).device.type == "cpu" and (run is None or run.args.device.type == "cpu")
    if not on_cpu or config._attn_implementation != "sdpa" or config.sub_configs:
        return False
    attend_by_segment(model)
    try:
        return config._attn_implementation == NAME and flattening_fault(model, num_rows, run) is None
    finally:
        attend_as_before(model)
