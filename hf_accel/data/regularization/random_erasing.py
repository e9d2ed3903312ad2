"""Blank a rectangle of an image, so that no single part of it decides the class.

A model that relies on one telling detail fails when the detail is hidden; it must learn to use the rest:

    with probability q = ``probability`` * min(p / ``ramp``, 1) at progress p: blank a rectangle of
    area ~ U(0.02, ``largest``) of the image and height / width ~ U(0.3, 1 / 0.3), at a random place

The blank color is the image's own mean.  Seed, epoch and example determine everything, so neither ranks nor
micro-batches change anything.

Recommendation: Use RandomErasing if you classify images over many epochs with a model that overfits.
When to use: Image classification and re-identification over many epochs, with a model that overfits.  The authors
report fewer errors on CIFAR-10 and CIFAR-100.
When not to use: Few epochs.  Small objects that the rectangle hides completely, because their label is then wrong.
Differences from the paper:
- The mean color replaces random ones, so the normalization of the images need not be known.
- A rectangle that does not fit in ten draws is skipped.
- The strength may rise.
References: Zhong et al. (2020), Random Erasing Data Augmentation, https://arxiv.org/abs/1708.04896.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
from torch import Tensor

from hf_accel.features.augmentation import generators, images_of, refuse_other_than_images, strength
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

SMALLEST = 0.02
"""Smallest area, as a share of the image."""
FLATTEST = 0.3
"""Smallest ratio of height to width, and of width to height."""

Box = tuple[int, int, int, int]
"""Top, bottom, left and right in pixels; bottom and right are exclusive."""


def draw_rectangle(
    generator: np.random.Generator, probability: float, largest: float, height: int, width: int
) -> Box | None:
    """Draw the rectangle to blank in one image; None for no rectangle."""
    if generator.random() >= probability:
        return None
    for _ in range(10):
        area = generator.uniform(SMALLEST, largest) * height * width
        ratio = generator.uniform(FLATTEST, 1 / FLATTEST)
        box_height, box_width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return top, top + box_height, left, left + box_width
    return None


def blank(images_B: Tensor, boxes: list[Box | None]) -> Tensor:
    """Fill each image's box with its mean color."""
    erased_B = images_B.clone()
    for image, box in zip(erased_B, boxes, strict=True):
        if box is not None:
            top, bottom, left, right = box
            image[:, top:bottom, left:right] = image.mean((1, 2), keepdim=True)
    return erased_B


@dataclass(eq=False)
class RandomErasing(Technique):
    """Train on images that may have a blank rectangle.

    Args:
        probability: Share of the images that lose a rectangle, in [0, 1].
        largest: Largest area of a rectangle, as a share of the image, above 0.02 and at most 1.
        ramp: Progress, in [0, 1], until which the probability rises linearly from 0; 0: full from the start.
    """

    probability: Fraction = 0.5  # the paper's
    largest: Annotated[float, at.Interval(gt=SMALLEST, le=1)] = 0.4  # the paper's
    ramp: Fraction = 0.0  # no ramp, as in the paper
    modality: ClassVar = "image"
    neutral: ClassVar = {"probability": 0.0}
    rank_counters: ClassVar = ("erased", "seen")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_other_than_images(self, model)
        self.erased_, self.seen_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Blank a rectangle of some images."""
        probability = self.probability * strength(self)
        self.seen_ += sum(len(micro.ids_B) for micro in batch.micro_batches)
        if probability == 0:
            return batch
        micros = []
        for micro in batch.micro_batches:
            images_B = images_of(self, micro)
            size = images_B.shape[-2:]
            drawn = generators(self, batch.plan, micro)
            boxes = [draw_rectangle(generator, probability, self.largest, *size) for generator in drawn]
            micros.append(micro._replace(inputs={**micro.inputs, "pixel_values": blank(images_B, boxes)}))
            self.erased_ += sum(box is not None for box in boxes)
        return dataclasses.replace(batch, micro_batches=micros)

    def report(self) -> Mapping[str, Any]:
        """Report the share of the images with a blank rectangle, on this rank."""
        return {"erased": self.erased_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["erased"] > 0
