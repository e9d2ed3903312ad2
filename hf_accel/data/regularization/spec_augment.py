"""Blank some bands and some stretches of time of a spectrogram.

Speech can be understood without a band or a moment.  A model that must do so memorizes recordings less:

    ``frequency_masks`` times:  blank f ~ U{0 .. ``frequency_width`` * F} neighboring bands of F
    ``time_masks`` times:       blank t ~ U{0 .. ``time_width`` * T} neighboring frames of the example's T

Widths grow linearly with progress until ``ramp``.  The blank value is the mean of the example's spectrogram.  Seed,
epoch and example determine everything, so neither ranks nor micro-batches change anything.

Recommendation: Use SpecAugment if you train on spectrograms over many epochs.
When to use: Speech recognition and audio classification on spectrograms (Whisper, Speech2Text, AST) over many epochs.
The authors report fewer wrong words on LibriSpeech and Switchboard.
When not to use:
- Few epochs.
- Models with ``mask_time_prob`` in their configuration while ``apply_spec_augment`` is on: they do the same.
- Models of raw waveforms, such as wav2vec 2.0: they mask their features themselves.
Differences from the paper:
- Widths are shares of the spectrogram.  They follow the paper's policy for LibriSpeech: 27 of 80 bands, and frames by
  the recording's length.
- There is no time warping, which gained least in the paper.
- The strength may rise.
References: Park et al. (2019), SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition,
https://arxiv.org/abs/1904.08779.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
from torch import Tensor

from hf_accel.features.augmentation import generators, strength
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

BANDS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
"""Fields of configurations with the number of bands of a spectrogram."""


def draw_stretches(generator: np.random.Generator, number: int, length: int, width: float) -> list[slice]:
    """Draw ``number`` stretches of random place and width, each at most the share ``width`` of a length."""
    stretches = []
    for _ in range(number):
        stretch = int(generator.integers(int(width * length) + 1))
        begin = int(generator.integers(length - stretch + 1))
        stretches.append(slice(begin, begin + stretch))
    return stretches


@dataclass(eq=False)
class SpecAugment(Technique):
    """Train on spectrograms with blank bands and moments.

    Args:
        frequency_masks: Number of stretches of bands, at least 0.
        frequency_width: Largest width of one, as a share of all bands, in [0, 1].
        time_masks: Number of stretches of frames, at least 0.
        time_width: Largest width of one, as a share of the example's frames, in [0, 1].
        ramp: Progress, in [0, 1], until which the widths rise linearly from 0; 0: full from the start.
    """

    frequency_masks: Annotated[int, at.Ge(0)] = 2  # the paper's policy LD
    frequency_width: Fraction = 0.33  # 27 of 80 bands
    time_masks: Annotated[int, at.Ge(0)] = 2  # the paper's policy LD
    time_width: Fraction = 0.07  # 100 of about 1,500 frames
    ramp: Fraction = 0.0  # no ramp, as in the paper
    modality: ClassVar = "speech"
    neutral: ClassVar = {"frequency_masks": 0, "time_masks": 0}
    variations: ClassVar = {"time_width": 0.5}
    rank_counters: ClassVar = ("blank", "seen")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        config = getattr(model, "config", None)
        self.bands_ = next((getattr(config, name) for name in BANDS if hasattr(config, name)), None)
        if self.bands_ is None:
            remedy = "Set config.mask_time_prob" if hasattr(config, "mask_time_prob") else "Remove SpecAugment"
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it reads no spectrograms. {remedy}."
            )
        if getattr(config, "apply_spec_augment", False):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it masks its spectrograms already. "
                "Set config.apply_spec_augment=False."
            )
        self.blank_, self.seen_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Blank stretches of each spectrogram."""
        micros = []
        for micro in batch.micro_batches:
            name = next((name for name in ("input_features", "input_values") if name in micro.inputs), "")
            features_B = micro.inputs.get(name)
            if features_B is None or features_B.dim() != 3 or self.bands_ not in features_B.shape[1:]:
                raise ValueError(
                    f"{self!r} needs spectrograms of {self.bands_} bands in the batch ({', '.join(micro.inputs)}), "
                    "(examples, bands, frames) or (examples, frames, bands). Remove SpecAugment."
                )
            masked_B = features_B.clone()
            frames_first = features_B.shape[2] == self.bands_
            lengths_B = self._lengths(micro.inputs, features_B.shape[1 if frames_first else 2], len(features_B))
            drawn = generators(self, batch.plan, micro)
            for masked, length, generator in zip(masked_B, lengths_B, drawn, strict=True):
                spectrogram_TF = masked if frames_first else masked.T
                self._blank(spectrogram_TF[:length], generator)
            self.blank_ += int((masked_B != features_B).sum())
            self.seen_ += features_B.numel()
            micros.append(micro._replace(inputs={**micro.inputs, name: masked_B}))
        return dataclasses.replace(batch, micro_batches=micros)

    def _blank(self, spectrogram_TF: Tensor, generator: np.random.Generator) -> None:
        """Blank stretches of one spectrogram in place."""
        mean, share = spectrogram_TF.mean(), strength(self)
        length, bands = spectrogram_TF.shape
        for stretch in draw_stretches(generator, self.frequency_masks, bands, self.frequency_width * share):
            spectrogram_TF[:, stretch] = mean
        for stretch in draw_stretches(generator, self.time_masks, length, self.time_width * share):
            spectrogram_TF[stretch] = mean

    def _lengths(self, inputs: Mapping[str, Tensor], num_frames: int, num_examples: int) -> list[int]:
        """Count the frames of each example, without padding if there is an attention_mask."""
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != (num_examples, num_frames):
            return [num_frames] * num_examples
        return torch.where(mask.bool(), torch.arange(1, num_frames + 1), 0).amax(1).tolist()

    def report(self) -> Mapping[str, Any]:
        """Report the blank share of the spectrograms, on this rank."""
        return {"blank": self.blank_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["blank"] > 0
