"""Techniques that train or compute a part of the model, and when."""

from hf_accel.model.curriculum.layer_freezing import LayerFreezing
from hf_accel.model.curriculum.progressive_layer_drop import ProgressiveLayerDrop
from hf_accel.model.curriculum.progressive_stacking import ProgressiveStacking
from hf_accel.model.curriculum.stochastic_depth import StochasticDepth

__all__ = ["LayerFreezing", "ProgressiveLayerDrop", "ProgressiveStacking", "StochasticDepth"]
