"""Train on weighted averages of two images, with the same average of their classes.

A model that must be linear between examples memorizes less, so a longer run overfits later:

    x' = lam * x_i + (1 - lam) * x_j,    y' = lam * y_i + (1 - lam) * y_j,    lam ~ Beta(a, a)

with y as shares of classes, and a = ``alpha`` * min(p / ``ramp``, 1) at progress p.  The loss is the cross-entropy with
these shares: lam * CE(y_i) + (1 - lam) * CE(y_j).  Example j is i's neighbor in the step, which is random if the order
is. Seed, epoch and example determine lam, so neither ranks nor micro-batches change anything.

Recommendation: Use Mixup if you classify images over many epochs with a model that overfits.
When to use: Image classification over many epochs, with a model that overfits.  The authors report 0.2 to 1.5 points on
ImageNet.
When not to use:
- Few epochs, where it slows down learning.
- Models that underfit.
- Techniques that choose examples by their loss, because a mixed image has the loss of two.
Differences from the paper:
- Each example has its own lam, not each batch.
- Partners are neighbors in the step.
- The strength may rise.
References: Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization, https://arxiv.org/abs/1710.09412.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.features.mixing import Generators, ImageMixing


def mix(images_B: Tensor, partners_B: Tensor, shares_B: Tensor) -> Tensor:
    """Average images and their partners; ``shares_B`` are the images' own shares, in [0, 1]."""
    return torch.lerp(partners_B, images_B, shares_B.to(images_B)[:, None, None, None])


@dataclass(eq=False)
class Mixup(ImageMixing):
    """Train on averages of two images, and on the same averages of their labels.

    Args:
        alpha: Both parameters of the Beta distribution of the shares; 0 mixes nothing, 1 makes all equally likely.
        ramp: Progress, in [0, 1], until which alpha rises linearly from 0; 0: full from the start.
    """

    alpha: Annotated[float, at.Ge(0)] = 0.2  # the paper's, for ImageNet

    def combine(self, images_B: Tensor, partners_B: Tensor, alpha: float, drawn: Generators) -> tuple[Tensor, Tensor]:
        """Average each image with its partner."""
        shares_B = torch.tensor([generator.beta(alpha, alpha) for generator in drawn], dtype=torch.float32)
        return mix(images_B, partners_B, shares_B), shares_B

    def foreign(self, shares_B: Tensor) -> Tensor:
        """Return the share of the smaller part of each image."""
        return torch.minimum(shares_B, 1 - shares_B)

    def report(self) -> Mapping[str, Any]:
        """Report the mean share of the smaller part of a mixed image, on this rank."""
        return {"mixed": self.mixed_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["mixed"] > 0
