"""Averages of weights over the steps of a run; one at a time."""

from hf_accel.optim.averaging.ema import ExponentialMovingAverage
from hf_accel.optim.averaging.lawa import LatestWeightAveraging
from hf_accel.optim.averaging.lookahead import Lookahead
from hf_accel.optim.averaging.swa import StochasticWeightAveraging

__all__ = ["ExponentialMovingAverage", "LatestWeightAveraging", "Lookahead", "StochasticWeightAveraging"]
