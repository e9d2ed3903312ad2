"""Multiple-choice batches as rows: tensors (B, C, L) of B examples with C choices each, as (B * C, L).

Shape suffixes: ``B`` examples, ``C`` choices, ``L`` positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def folded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Give every choice a row of its own; inputs with one row per example stay the same."""
    shape = inputs["input_ids"].shape
    if len(shape) < 3:
        return dict(inputs)
    return {
        name: value.flatten(0, 1) if isinstance(value, Tensor) and value.shape[:3] == shape else value
        for name, value in inputs.items()
    }
