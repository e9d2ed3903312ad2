"""Techniques without a gain here or elsewhere at equal quality: complete and tested, but in no preset.

Recipes and options name them with their package, as in ``hf_accel.contrib:GradientNormFreezing``.
"""

from hf_accel.contrib.gradient_norm_freezing import GradientNormFreezing
from hf_accel.contrib.plasticity_freezing import PlasticityFreezing

__all__ = ["GradientNormFreezing", "PlasticityFreezing"]
