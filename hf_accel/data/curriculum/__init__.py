"""Train on easy, short or small examples first."""

from hf_accel.data.curriculum.difficulty_curriculum import DifficultyCurriculum
from hf_accel.data.curriculum.resolution_warmup import ResolutionWarmup
from hf_accel.data.curriculum.sequence_length_warmup import SequenceLengthWarmup

__all__ = ["DifficultyCurriculum", "ResolutionWarmup", "SequenceLengthWarmup"]
