"""Paste a rectangle of one image into another, and mix their classes by area.

Erasing a part of an image throws pixels away.  Here the pixels teach another class, and every part of an object counts:

    x' = x_j inside a box, x_i outside,    y' = s * y_i + (1 - s) * y_j,    s = the share of the pixels outside

The box has sqrt(1 - lam) of the height and of the width, lam ~ Beta(a, a), and a random center.  The part beyond the
image is cut off.  At progress p, a = ``alpha`` * min(p / ``ramp``, 1).  j is i's neighbor in the step, which is random
if the order is.  Seed, epoch and example determine the box, so neither ranks nor micro-batches change anything.

Recommendation: Use CutMix if you classify images over many epochs with a model that overfits.
When to use: Image classification over many epochs, with a model that overfits.  The authors report 2.3 points on
ImageNet with a ResNet-50, after 300 epochs.
When not to use:
- Few epochs, where it slows down learning.
- Images with the class in a small place that the box may hide.
- Techniques that choose examples by their loss, because a mixed image has the loss of two.
Differences from the paper:
- Each example has its own box, not each batch.
- Partners are neighbors in the step.
- The strength may rise.
References: Yun et al. (2019), CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
https://arxiv.org/abs/1905.04899.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
import numpy as np
import torch
from torch import Tensor

from hf_accel.features.mixing import Generators, ImageMixing

Box = tuple[int, int, int, int]
"""Top, bottom, left and right in pixels; bottom and right are exclusive."""


def draw_box(generator: np.random.Generator, alpha: float, height: int, width: int) -> Box:
    """Draw the rectangle to paste into one image."""
    side = (1 - generator.beta(alpha, alpha)) ** 0.5
    box_height, box_width = int(side * height), int(side * width)
    top, left = (int(generator.integers(size)) for size in (height, width))
    top, left = top - box_height // 2, left - box_width // 2
    bottom, right = min(top + box_height, height), min(left + box_width, width)
    return max(top, 0), bottom, max(left, 0), right


def paste(images_B: Tensor, partners_B: Tensor, boxes: list[Box]) -> tuple[Tensor, Tensor]:
    """Paste the partners' pixels inside the boxes; also return each image's share of its own pixels, (B,)."""
    top_B, bottom_B, left_B, right_B = torch.tensor(boxes).T[:, :, None, None]
    height, width = images_B.shape[-2:]
    rows_H1, columns_W = torch.arange(height)[:, None], torch.arange(width)
    inside_BHW = (top_B <= rows_H1) & (rows_H1 < bottom_B) & (left_B <= columns_W) & (columns_W < right_B)
    mask = inside_BHW.to(images_B.device)[:, None]
    return torch.where(mask, partners_B, images_B), 1 - inside_BHW.float().mean((1, 2))


@dataclass(eq=False)
class CutMix(ImageMixing):
    """Train on images with a rectangle of another one, and on labels mixed by area.

    Args:
        alpha: Both parameters of the Beta distribution of the areas; 0 mixes nothing, 1 makes all areas equally likely.
        ramp: Progress, in [0, 1], until which alpha rises linearly from 0; 0: full from the start.
    """

    alpha: Annotated[float, at.Ge(0)] = 1.0  # the paper's

    def combine(self, images_B: Tensor, partners_B: Tensor, alpha: float, drawn: Generators) -> tuple[Tensor, Tensor]:
        """Paste a rectangle of its partner into each image."""
        size = images_B.shape[-2:]
        return paste(images_B, partners_B, [draw_box(generator, alpha, *size) for generator in drawn])

    def report(self) -> Mapping[str, Any]:
        """Report the mean share of the pixels that come from another image, on this rank."""
        return {"pasted": self.mixed_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["pasted"] > 0
