"""Faster modules: the same functions for less time or memory."""

from hf_accel.model.modules.channels_last import ChannelsLast
from hf_accel.model.modules.chunked_cross_entropy import ChunkedCrossEntropy
from hf_accel.model.modules.random_token_drop import RandomTokenDrop
from hf_accel.model.modules.regional_compile import RegionalCompile
from hf_accel.model.modules.sparse_masked_head import SparseMaskedHead

__all__ = ["ChannelsLast", "ChunkedCrossEntropy", "RandomTokenDrop", "RegionalCompile", "SparseMaskedHead"]
