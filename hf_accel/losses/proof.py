"""Prove on the data of a run which loss is computed, before it is split or scaled.

Source text and class names tell the intended loss.  A subclass, an instance or a trainer may compute another one, so
two statements are checked before their first use.  A `Head` returns the model's own loss, and a loss is divided by the
given number of items.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.batch import named_tensors
from hf_accel.losses.heads import IGNORED, Head, weighted_mean

FULL_PRECISION, HALF_PRECISION = 1e-3, 2e-2
"""Largest difference of two computations of one loss, relative to it."""
LABELS = re.compile(r"label|target|^\[")
"""Names of tensors that may be labels; ``[`` begins those without a name."""
EXAMPLES = ""
"""Key of the number of examples."""
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
    if not math.isfinite(theirs) or math.isclose(
        theirs, ours, rel_tol=HALF_PRECISION if half else FULL_PRECISION, abs_tol=1e-5
    ):
        return None
    return theirs, ours


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


def sizes_of_mean(inputs: Any, num_examples: int, *, shifted: bool) -> dict[str, int]:
    """Return the numbers of items that a mean loss may be a mean of, by the name of their labels, and of examples.

    Labels are whole numbers whose name says so, or that have none.  The first entry is the likely one.
    """
    sizes: dict[str, int] = {}
    for name, value in named_tensors(inputs):
        if not value.is_floating_point() and LABELS.search(name):
            value = value[..., 1:] if shifted and name == "labels" and value.dim() > 1 else value
            sizes[name] = sizes.get(name, 0) + int(value.ne(IGNORED).sum())
    likely = {name: sizes[name] for name in ("shift_labels", "labels") if name in sizes}
    return {**likely, EXAMPLES: num_examples, **sizes}


def error_of_mean(loss: float, parts: Sequence[float], sizes: Sequence[float]) -> float:
    """Return the distance, relative to a loss, of the mean of its parts' losses, each as large as told."""
    if not sum(sizes):
        return math.inf
    mean = math.fsum(part * size for part, size in zip(parts, sizes, strict=True) if size) / sum(sizes)
    error = abs(mean - loss) / max(abs(loss), 1e-8)
    return math.inf if math.isnan(error) else error
