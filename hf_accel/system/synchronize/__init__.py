"""Choose what ranks exchange, and when."""

from hf_accel.system.synchronize.diloco import DiLoCo
from hf_accel.system.synchronize.gradient_compression import GradientCompression
from hf_accel.system.synchronize.local_sgd import LocalSGD

__all__ = ["DiLoCo", "GradientCompression", "LocalSGD"]
