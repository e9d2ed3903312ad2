"""Compute the attention of each example of a row by itself, if ``position_ids`` mark several examples.

The mask of ``sdpa`` for such a row, (T, T), hides other examples but still computes all T^2 scores.  The examples need
only the sum of their squared lengths.  On CPUs it is cheaper to visit them one by one, like the kernels of flash
attention:

    softmax(q_e k_e^T / sqrt(d)) v_e      for every example e

It is registered with ``transformers`` as an attention implementation.  Rows with an ``attention_mask``, windows and all
other masks are left to ``sdpa``.

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

from hf_accel.features.flattening_trial import flattening_fault
from hf_accel.host.internals import attention_of

NAME = "sdpa_by_segment"

_segments = WeakTensorKeyDictionary()
"""Lengths of the examples of each row, by the ``position_ids`` that all blocks of a model receive."""


def segment_lengths(position_ids_RT: Tensor) -> list[list[int]] | None:
    """Return the lengths of the examples of each row, or None if no row has several."""
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
    """Return the result of ``sdpa``, (R, T, H, D); the signature is of `transformers.AttentionInterface`."""
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
    """Return None if only the borders of examples matter, else the mask of ``sdpa``."""
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
    """Switch a model to this attention, if it `can_attend_by_segment`."""
    model.set_attn_implementation(NAME)


def attend_as_before(model: Any) -> None:
    """Undo `attend_by_segment`."""
    if attention_of(model) == NAME:
        model.set_attn_implementation("sdpa")


def can_attend_by_segment(model: Any, num_rows: int = 1, run: Any = None) -> bool:
    """Return whether a model trains on a CPU with ``sdpa`` attention and keeps examples apart in this way.

    A trial decides, and leaves the model as found.
    """
    on_cpu = next(model.parameters()).device.type == "cpu" and (run is None or run.args.device.type == "cpu")
    if not on_cpu or attention_of(model) != "sdpa" or model.config.sub_configs:
        return False
    attend_by_segment(model)
    try:
        return attention_of(model) == NAME and flattening_fault(model, num_rows, run) is None
    finally:
        attend_as_before(model)
