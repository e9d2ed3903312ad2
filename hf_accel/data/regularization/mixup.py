"""Mixup: train on weighted averages of two images, with the same average of their classes.

A model that must be linear between examples memorizes less, so that a longer run overfits later:

    x' = lam * x_i + (1 - lam) * x_j,    y' = lam * y_i + (1 - lam) * y_j,    lam ~ Beta(a, a)

with y as shares of classes, and a = ``alpha`` * min(p / ``ramp``, 1) at progress p.  The loss is the cross-entropy with
these shares, lam * CE(y_i) + (1 - lam) * CE(y_j).  j is i's neighbor in the step, which is random where the order is,
and lam is drawn for each example by seed, epoch and example; so neither ranks nor micro-batches change anything.

Reference: Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization, https://arxiv.org/abs/1710.09412.
Departures: lam for each example, not for each batch; partners are neighbors; the strength may rise.

When to use: image classification over many epochs, with a model that overfits; the authors report 0.2 to 1.5 points on
ImageNet.
When not to use: few epochs, where it slows down learning; models that underfit; where the loss of an example decides
what is trained on, as a mixed one is the loss of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.features.augmentation import generators, images_of, strength
from hf_accel.features.mixing import partners, prepare_soft_labels, with_soft_labels
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch


def mix(images_B: Tensor, partners_B: Tensor, shares_B: Tensor) -> Tensor:
    """Averages of images and their partners; ``shares_B`` are the images' own, in [0, 1]."""
    return torch.lerp(partners_B, images_B, shares_B.to(images_B)[:, None, None, None])


@dataclass(eq=False)
class Mixup(Technique):
    """Trains on averages of two images, and on the same averages of their labels.

    Args:
        alpha: Both parameters of the Beta distribution of the shares; 0 mixes nothing, 1 makes all shares alike likely.
        ramp: Progress, in [0, 1], until which alpha rises from 0 in proportion; 0: full from the start.
    """

    alpha: Annotated[float, at.Ge(0)] = 0.2  # the paper's, for ImageNet
    ramp: Fraction = 0.0
    modality: ClassVar = "image"
    neutral: ClassVar = {"alpha": 0.0}
    rank_counters: ClassVar = ("mixed", "seen")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        prepare_soft_labels(self, model)
        self.mixed_, self.seen_ = 0.0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Every image mixed with its neighbor."""
        alpha = self.alpha * strength(self)
        self.seen_ += sum(len(micro.ids_B) for micro in batch.micro_batches)
        if alpha == 0:
            return batch
        micros = []
        for micro, (partners_B, labels_B) in zip(batch.micro_batches, partners(self, batch), strict=True):
            drawn = [generator.beta(alpha, alpha) for generator in generators(self, batch.plan, micro)]
            shares_B = torch.tensor(drawn, dtype=torch.float32)
            images_B = mix(images_of(self, micro), partners_B, shares_B)
            micros.append(with_soft_labels(self, micro, images_B, labels_B, shares_B))
            self.mixed_ += float(torch.minimum(shares_B, 1 - shares_B).sum())
        return dataclasses.replace(batch, micro_batches=micros)

    def report(self) -> Mapping[str, Any]:
        """The mean share of the lesser part of a mixed image, on this rank."""
        return {"mixed": self.mixed_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["mixed"] > 0
