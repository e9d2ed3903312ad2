"""Training of fewer or smaller numbers, which ends in an ordinary checkpoint."""

from hf_accel.model.compression.lora import LoRA

__all__ = ["LoRA"]
