"""Model-centric techniques."""

from hf_accel.model import compression, curriculum, initialization, modules
from hf_accel.model.compression import *
from hf_accel.model.curriculum import *
from hf_accel.model.initialization import *
from hf_accel.model.modules import *

__all__ = []
__all__ += compression.__all__
__all__ += curriculum.__all__
__all__ += initialization.__all__
__all__ += modules.__all__
