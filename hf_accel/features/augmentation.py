"""What augmentations share: random numbers of an example, a strength that rises, and what they refuse."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_accel.batch import MicroBatch, StepPlan
from hf_accel.technique import Technique


def generators(technique: Technique, plan: StepPlan, micro: MicroBatch) -> list[np.random.Generator]:
    """One for each example, keyed by seed, epoch, example, technique and how often the example came before."""
    purpose = zlib.crc32(type(technique).__name__.encode())
    keys = [(plan.seed, plan.epoch, i % 2**32, purpose) for i in micro.ids_B.tolist()]
    if micro.repeats_B is not None:
        keys = [(*key, repeat) if repeat else key for key, repeat in zip(keys, micro.repeats_B.tolist(), strict=True)]
    return [np.random.default_rng(key) for key in keys]


def strength(technique: Any) -> float:
    """The present share of a technique's full strength: rising from 0 until progress ``ramp``, then 1."""
    assert technique.run_ is not None
    return min(technique.run_.clock.progress / technique.ramp, 1.0) if technique.ramp else 1.0


def refuse_other_than_images(technique: Technique, model: nn.Module | None) -> None:
    """Raise where a model's main input is not images."""
    if (name := getattr(model, "main_input_name", None)) != "pixel_values":
        raise ValueError(
            f"{technique!r}: {type(model).__name__} reads {name}, not images (pixel_values). Leave it out."
        )


def images_of(technique: Technique, micro: MicroBatch) -> Tensor:
    """A micro-batch's images, (B, C, H, W), on the device of the model."""
    assert technique.run_ is not None
    images, labels = micro.inputs["pixel_values"], micro.inputs.get("labels")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"{technique!r}: pixel_values of {images.dtype} and shape {tuple(images.shape)} are not images as numbers, "
            "(examples, channels, height, width). Leave it out."
        )
    if (isinstance(labels, Tensor) and labels.dim() > 2) or not isinstance(labels, Tensor | None):
        raise ValueError(f"{technique!r}: the labels belong to places in the images, not to images. Leave it out.")
    return images.to(technique.run_.args.device, non_blocking=True)
