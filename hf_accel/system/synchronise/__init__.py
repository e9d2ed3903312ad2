"""What ranks exchange, and when."""

from hf_accel.system.synchronise.diloco import DiLoCo
from hf_accel.system.synchronise.gradient_compression import GradientCompression
from hf_accel.system.synchronise.local_sgd import LocalSGD

__all__ = ["DiLoCo", "GradientCompression", "LocalSGD"]
