"""Prove on the data of a run which loss is computed, before it is split or scaled.

Source text and class names tell the intended loss.  A subclass, an instance or a trainer may compute another one, so
two statements are checked before their first use.  A `Head` returns the model's own loss, and a loss is divided by the
given number of items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_accel.losses.heads import IGNORED, Head, weighted_mean

FULL_PRECISION, HALF_PRECISION = 1e-3, 2e-2
"""Largest difference of two computations of one loss, relative to it."""
DIVIDED = 1e-4
"""Largest distance from 1 of the share of a loss that is divided by the number of items."""


def compare_losses(
    head: Head, outputs: Any, inputs: Mapping[str, Any], num_examples: int, *, half: bool
) -> tuple[float, float] | None:
    """Return the model's own mean loss and the head's for the same outputs, if they differ.

    Return None if they agree, or if there is no loss or no item that counts.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    items_K = head.count(inputs, num_examples)
    if own is None or not bool(items_K.all()):
        return None
    ours = float(weighted_mean(head.losses(outputs, inputs, num_examples), items_K))
    theirs = float(own.mean())
    if not math.isfinite(theirs) or agree(theirs, ours, half=half):
        return None
    return theirs, ours


def agree(a: float, b: float, *, half: bool) -> bool:
    """Return whether two computations of one loss, in ``half`` or full precision, agree."""
    return math.isclose(a, b, rel_tol=HALF_PRECISION if half else FULL_PRECISION, abs_tol=1e-5)


def is_divided_by(loss: Tensor, items: Tensor, scale: float = 1.0) -> bool | None:
    """Return whether a loss is wholly divided by ``items``, which have the gradient of a backward pass.

    For ``L = S / n + A``, ``-n dL/dn = S / n``, so the quotient by ``L`` is 1 only where ``A`` is 0.  A loss that
    ignores ``n`` leaves no gradient.

    Args:
        scale: Factor of the loss in the backward pass.

    Returns:
        None if the loss is 0 or depends on ``items`` but is not finite, which tells nothing.
    """
    if float(loss) == 0:
        return None
    if items.grad is None:
        return False
    if not bool(torch.isfinite(loss)):
        return None
    return abs(float(-items.grad * items.detach() / (scale * loss)) - 1) < DIVIDED


def items_of_mean(inputs: Any, num_examples: int, *, shifted: bool) -> int:
    """How many items a mean loss is a mean of: labels that count, or else examples."""
    labels = inputs.get("shift_labels", inputs.get("labels")) if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return num_examples
    if shifted and labels.dim() > 1 and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return int(labels.ne(IGNORED).sum())
