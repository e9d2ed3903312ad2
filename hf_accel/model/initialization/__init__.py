"""Where training starts: better first values, and values from another model."""

from hf_accel.model.initialization.depth_scaled_init import DepthScaledInit
from hf_accel.model.initialization.expand_from import ExpandFrom
from hf_accel.model.initialization.mu_parametrization import MuParametrization
from hf_accel.model.initialization.shrink_from import ShrinkFrom
from hf_accel.model.initialization.zero_init_residual import ZeroInitResidual

__all__ = ["DepthScaledInit", "ExpandFrom", "MuParametrization", "ShrinkFrom", "ZeroInitResidual"]
