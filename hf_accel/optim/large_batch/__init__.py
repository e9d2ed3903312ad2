"""Choose how many examples a step has, and train with very large step batches."""

from hf_accel.optim.large_batch.batch_size_ramp import BatchSizeRamp
from hf_accel.optim.large_batch.gradient_noise_scale import GradientNoiseScale
from hf_accel.optim.large_batch.lamb import LAMB
from hf_accel.optim.large_batch.lars import LARS
from hf_accel.optim.large_batch.noise_scale_ramp import NoiseScaleRamp
from hf_accel.optim.large_batch.seesaw import Seesaw

__all__ = ["LAMB", "LARS", "BatchSizeRamp", "GradientNoiseScale", "NoiseScaleRamp", "Seesaw"]
