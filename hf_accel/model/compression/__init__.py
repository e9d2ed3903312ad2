"""Training of fewer or smaller numbers, which ends in an ordinary checkpoint."""

from hf_accel.model.compression.lora import LoRA
from hf_accel.model.compression.low_rank_training import LowRankTraining
from hf_accel.model.compression.sparse_training import SparseTraining

__all__ = ["LoRA", "LowRankTraining", "SparseTraining"]
