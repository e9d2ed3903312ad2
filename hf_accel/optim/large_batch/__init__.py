"""How many examples a step takes."""

from hf_accel.optim.large_batch.batch_size_ramp import BatchSizeRamp

__all__ = ["BatchSizeRamp"]
