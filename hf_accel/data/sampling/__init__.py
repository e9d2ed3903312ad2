"""Which examples an epoch trains on."""

from hf_accel.data.sampling.info_batch import InfoBatch

__all__ = ["InfoBatch"]
