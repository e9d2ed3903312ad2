"""Augment examples, so that each teaches more."""

from hf_accel.data.regularization.cut_mix import CutMix
from hf_accel.data.regularization.mixup import Mixup
from hf_accel.data.regularization.rand_augment import RandAugment
from hf_accel.data.regularization.random_erasing import RandomErasing
from hf_accel.data.regularization.spec_augment import SpecAugment
from hf_accel.data.regularization.token_cutoff import TokenCutoff

__all__ = ["CutMix", "Mixup", "RandAugment", "RandomErasing", "SpecAugment", "TokenCutoff"]
