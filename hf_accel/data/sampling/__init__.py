"""Choose the examples that an epoch trains on."""

from hf_accel.data.sampling.coreset import Coreset
from hf_accel.data.sampling.deduplicate import Deduplicate
from hf_accel.data.sampling.early_score_pruning import EarlyScorePruning
from hf_accel.data.sampling.importance_sampling import ImportanceSampling
from hf_accel.data.sampling.info_batch import InfoBatch
from hf_accel.data.sampling.random_subset import RandomSubset
from hf_accel.data.sampling.rho_loss import RHOLoss
from hf_accel.data.sampling.score_pruning import ScorePruning
from hf_accel.data.sampling.selective_backprop import SelectiveBackprop
from hf_accel.data.sampling.weighted_sampling import WeightedSampling

__all__ = [
    "Coreset",
    "Deduplicate",
    "EarlyScorePruning",
    "ImportanceSampling",
    "InfoBatch",
    "RHOLoss",
    "RandomSubset",
    "ScorePruning",
    "SelectiveBackprop",
    "WeightedSampling",
]
