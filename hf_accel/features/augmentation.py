"""Random numbers, a rising strength and refusals that augmentations share."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_accel.batch import MicroBatch, StepPlan
from hf_accel.technique import Technique


def generators(technique: Technique, plan: StepPlan, micro: MicroBatch) -> list[np.random.Generator]:
    """Make a generator for each example, keyed by seed, epoch, example, technique and earlier occurrences."""
    purpose = zlib.crc32(type(technique).__name__.encode())
    keys = [(plan.seed, plan.epoch, i % 2**32, purpose) for i in micro.ids_B.tolist()]
    if micro.repeats_B is not None:
        keys = [(*key, repeat) if repeat else key for key, repeat in zip(keys, micro.repeats_B.tolist(), strict=True)]
    return [np.random.default_rng(key) for key in keys]


def strength(technique: Any) -> float:
    """Return the present share of a technique's full strength: it rises from 0 until progress ``ramp``, then is 1."""
    assert technique.run_ is not None
    return min(technique.run_.clock.progress / technique.ramp, 1.0) if technique.ramp else 1.0


def refuse_other_than_images(technique: Technique, model: nn.Module | None) -> None:
    """Raise ValueError if the main input of a model is not images."""
    if (name := getattr(model, "main_input_name", None)) != "pixel_values":
        raise ValueError(
            f"{technique!r} does not support {type(model).__name__} because it reads {name}, not pixel_values. "
            f"Remove {type(technique).__name__}."
        )


def images_of(technique: Technique, micro: MicroBatch) -> Tensor:
    """Return the images of a micro-batch, (B, C, H, W), on the device of the model."""
    assert technique.run_ is not None
    images, labels = micro.inputs["pixel_values"], micro.inputs.get("labels")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"{technique!r} does not support pixel_values of {images.dtype} and shape {tuple(images.shape)}. Use a "
            "collator that returns floats of shape (examples, channels, height, width)."
        )
    if (isinstance(labels, Tensor) and labels.dim() > 2) or not isinstance(labels, Tensor | None):
        raise ValueError(
            f"{technique!r} does not support labels of places in the images. Remove {type(technique).__name__}."
        )
    return images.to(technique.run_.args.device, non_blocking=True)
