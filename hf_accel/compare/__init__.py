"""Comparing: how many times faster a recipe reaches the quality of a fair baseline."""

from hf_accel.compare.statistics import NonInferiority, SpeedUp, non_inferiority, speed_up

__all__ = ["NonInferiority", "SpeedUp", "non_inferiority", "speed_up"]
