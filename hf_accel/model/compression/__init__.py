"""Training of fewer or smaller numbers, which ends in an ordinary checkpoint."""

from hf_accel.model.compression.float8_training import Float8Training
from hf_accel.model.compression.int8_training import Int8Training
from hf_accel.model.compression.lora import LoRA
from hf_accel.model.compression.low_rank_training import LowRankTraining
from hf_accel.model.compression.sparse_training import SparseTraining

__all__ = ["Float8Training", "Int8Training", "LoRA", "LowRankTraining", "SparseTraining"]
