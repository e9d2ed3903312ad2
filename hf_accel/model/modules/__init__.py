"""Faster modules: the same functions for less time or memory."""

from hf_accel.model.modules.chunked_cross_entropy import ChunkedCrossEntropy

__all__ = ["ChunkedCrossEntropy"]
