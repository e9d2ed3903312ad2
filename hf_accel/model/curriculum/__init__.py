"""What part of the model is trained, and when."""

from hf_accel.model.curriculum.layer_freezing import LayerFreezing

__all__ = ["LayerFreezing"]
