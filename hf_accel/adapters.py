"""Unwrap models with peft adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils.import_utils import is_peft_available


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside a ``peft`` model, or the model itself."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def is_adapted(model: Any) -> bool:
    """Return whether a model has adapters, from any source."""
    return getattr(model, "peft_config", None) is not None
