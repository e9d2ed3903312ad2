"""Check what the owners of the stream's slots return, before a wrong index loses an example in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel.technique import Technique


def check_ids(owner: Technique, slot: str, ids_N: Any, num_examples: int) -> None:
    """Raise ValueError unless a slot returned indices of examples, of shape (N,) and int64."""
    if not isinstance(ids_N, Tensor) or ids_N.dtype != torch.int64 or ids_N.dim() != 1:
        what = f"{ids_N.dtype} of shape {tuple(ids_N.shape)}" if isinstance(ids_N, Tensor) else type(ids_N).__name__
        raise ValueError(f"{owner!r}: {slot} returned {what}. Return ids as an int64 tensor of shape (N,).")
    if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < num_examples:
        wrong = int(ids_N.min()) if ids_N.min() < 0 else int(ids_N.max())
        raise ValueError(f"{owner!r}: {slot} returned id {wrong}. Return ids from 0 to {num_examples - 1}.")


def check_selection(owner: Technique, selection: Any, epoch: int, num_examples: int) -> None:
    """Raise ValueError unless ``select`` returned some ascending ids, and weights of the same shape or None."""
    if not isinstance(selection, tuple) or len(selection) != 2:
        raise ValueError(
            f"{owner!r}: select returned a {type(selection).__name__}. Return ids and weights: `return ids_N, None`."
        )
    ids_N, weights_N = selection
    check_ids(owner, "select", ids_N, num_examples)
    if len(ids_N) == 0:
        raise ValueError(f"{owner!r} chose no example of epoch {epoch}. Keep more examples.")
    if bool((ids_N[1:] < ids_N[:-1]).any()):
        raise ValueError(f"{owner!r}: select returned ids out of order. Sort them; `order` sets the order.")
    if weights_N is not None and weights_N.shape != ids_N.shape:
        raise ValueError(
            f"{owner!r}: select returned weights of shape {tuple(weights_N.shape)} for {len(ids_N)} ids. "
            "Return one weight for each id."
        )


def check_order(owner: Technique, ordered_N: Any, ids_N: Tensor, num_examples: int) -> None:
    """Raise ValueError unless ``order`` returned as many ids as it received."""
    check_ids(owner, "order", ordered_N, num_examples)
    if len(ordered_N) != len(ids_N):
        raise ValueError(
            f"{owner!r}: order returned {len(ordered_N)} ids for {len(ids_N)}. Return each id once; `select` chooses."
        )
