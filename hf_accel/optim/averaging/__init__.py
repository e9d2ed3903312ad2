"""Averages of weights over the steps of a run; one at a time."""

from hf_accel.optim.averaging.ema import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
