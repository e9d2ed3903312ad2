"""In which order and shape examples meet in a batch."""

from hf_accel.data.batching.length_grouped import LengthGrouped
from hf_accel.data.batching.padding_free import PaddingFree

__all__ = ["LengthGrouped", "PaddingFree"]
