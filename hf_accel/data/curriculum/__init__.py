"""From easy to hard."""

from hf_accel.data.curriculum.sequence_length_warmup import SequenceLengthWarmup

__all__ = ["SequenceLengthWarmup"]
