"""Change the loss of a step, or how its gradient is computed."""

from hf_accel.optim.objective.distillation import Distillation
from hf_accel.optim.objective.mask_rate_schedule import MaskRateSchedule
from hf_accel.optim.objective.replaced_token_detection import ReplacedTokenDetection
from hf_accel.optim.objective.selective_language_modeling import SelectiveLanguageModeling
from hf_accel.optim.objective.sharpness_aware import SharpnessAware

__all__ = ["Distillation", "MaskRateSchedule", "ReplacedTokenDetection", "SelectiveLanguageModeling", "SharpnessAware"]
