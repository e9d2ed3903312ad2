"""In which order, number and shape examples meet in a batch."""

from hf_accel.data.batching.length_grouped import LengthGrouped
from hf_accel.data.batching.packing import Packing
from hf_accel.data.batching.padding_free import PaddingFree
from hf_accel.data.batching.token_budget import TokenBudget

__all__ = ["LengthGrouped", "Packing", "PaddingFree", "TokenBudget"]
