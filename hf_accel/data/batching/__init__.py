"""Decide on the order, number and shape of the examples of a batch."""

from hf_accel.data.batching.length_grouped import LengthGrouped
from hf_accel.data.batching.packing import Packing
from hf_accel.data.batching.padding_free import PaddingFree
from hf_accel.data.batching.tokens_per_batch import TokensPerBatch

__all__ = ["LengthGrouped", "Packing", "PaddingFree", "TokensPerBatch"]
