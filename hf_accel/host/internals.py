"""Read and undo private settings of models, configurations and callbacks of transformers and accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


def attention_of(model: Any) -> str:
    """Return the name of a model's attention, such as ``"sdpa"``; empty if it has none."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or ""


def unwrap_forward(copied: nn.Module) -> None:
    """Remove accelerate's wrapper from a copy of a model: it would call the original."""
    if "_original_forward" in vars(copied):
        del copied._original_forward, copied.forward


def sigterm_handler_before(callback: JITCheckpointCallback) -> Any:
    """Return the handler of SIGTERM that Trainer's callback replaced."""
    assert callback.jit_manager is not None
    return callback.jit_manager._original_sigterm_handler
