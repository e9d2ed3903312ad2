"""Mix the images of two examples: find partners, and make labels for both.

Shape suffixes: ``B`` examples of a micro-batch, ``N`` of a step, ``V`` classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel.batch import MicroBatch, StepBatch, split_step
from hf_accel.features.augmentation import generators, images_of, refuse_other_than_images, strength
from hf_accel.losses import ClassHead
from hf_accel.technique import Fraction, Technique

Generators = list[np.random.Generator]


@dataclass(eq=False)
class ImageMixing(Technique):
    """Mix every image of a step with its neighbor, and the labels by the shares of both; the base class of mixups.

    Args:
        alpha: Strength, at least 0; 0 mixes nothing.
        ramp: Progress, in [0, 1], until which alpha rises linearly from 0; 0: full from the start.
    """

    alpha: Annotated[float, at.Ge(0)] = 1.0
    ramp: Fraction = 0.0  # no ramp, as in the papers
    modality: ClassVar = "image"
    neutral: ClassVar = {"alpha": 0.0}
    rank_counters: ClassVar = ("mixed", "seen")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        prepare_soft_labels(self, model)
        self.mixed_, self.seen_ = 0.0, 0

    def combine(self, images_B: Tensor, partners_B: Tensor, alpha: float, drawn: Generators) -> tuple[Tensor, Tensor]:
        """Return the mixed images, and the share of each that is its own, (B,)."""
        raise NotImplementedError

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Mix every image with its neighbor."""
        alpha = self.alpha * strength(self)
        self.seen_ += sum(len(micro.ids_B) for micro in batch.micro_batches)
        if alpha == 0:
            return batch
        micros = []
        for micro, (partners_B, labels_B) in zip(batch.micro_batches, partners(self, batch), strict=True):
            drawn = generators(self, batch.plan, micro)
            images_B, shares_B = self.combine(images_of(self, micro), partners_B, alpha, drawn)
            micros.append(with_soft_labels(self, micro, images_B, labels_B, shares_B))
            self.mixed_ += float(self.foreign(shares_B).sum())
        return dataclasses.replace(batch, micro_batches=micros)

    def foreign(self, shares_B: Tensor) -> Tensor:
        """Return the share of each image to report as mixed in."""
        return 1 - shares_B


def prepare_soft_labels(technique: Technique, model: Any) -> None:
    """Check that the model classifies images with one class each, and write that into ``config.problem_type``.

    Otherwise the soft labels of the first batch would set another problem type.
    """
    refuse_other_than_images(technique, model)
    head = technique.run_.head  # type: ignore[union-attr]
    single = "single_label_classification"
    problems = (model.config.problem_type, getattr(head, "problem", None))
    if not isinstance(head, ClassHead) or model.config.num_labels < 2 or not {*problems} <= {None, single}:
        raise ValueError(
            f"{technique!r} does not support {type(model).__name__} with problem_type={model.config.problem_type!r} "
            f"and {model.config.num_labels} labels because its loss takes no shares of classes. "
            f"Remove {type(technique).__name__}."
        )
    model.config.problem_type = single


def partners(technique: Technique, batch: StepBatch) -> list[tuple[Tensor, Tensor]]:
    """Return, for each micro-batch, the images and the labels of its examples' partners.

    The examples at positions 2k and 2k + 1 of a step are partners; the last of an odd number takes the first.  If a
    partner is on another rank, the whole step is read again and transformed by the techniques before this one.  With
    micro-batches of even size, only the last step of an epoch may need that.
    """
    run: Any = technique.run_
    plan, micros = batch.plan, batch.micro_batches
    if any("labels" not in micro.inputs for micro in micros):
        raise ValueError(f"{technique!r} needs labels in the batch. Use a collator that returns them.")
    number = len(plan.ids_N)
    rows = split_step(number, plan.micro_batch_size, plan.rank, plan.world)
    wanted = [[(position ^ 1) % number for position in row] for row in rows]
    held = [position for row in rows for position in row]
    sources = [micro for micro, row in zip(micros, rows, strict=True) if row]
    if not {position for row in wanted for position in row} <= set(held):
        whole = run.stream.read(dataclasses.replace(plan, rank=0, world=1, micro_batch_size=number))
        for earlier in run.techniques[: run.techniques.index(technique)]:
            whole = earlier.transform_batch(whole)
        held, sources = list(range(number)), whole.micro_batches
    if not sources:  # this rank has only a filler
        return [(images_of(technique, micro), micro.inputs["labels"]) for micro in micros]
    images_N = torch.cat([images_of(technique, micro) for micro in sources])
    labels_N = torch.cat([micro.inputs["labels"] for micro in sources])
    place = {position: i for i, position in enumerate(held)}
    found = []
    for micro, row in zip(micros, wanted, strict=True):
        if row:
            picked = [place[position] for position in row]
            found.append((images_N[picked], labels_N[picked]))
        else:
            found.append((images_of(technique, micro), micro.inputs["labels"]))
    return found


def with_soft_labels(
    technique: Technique, micro: MicroBatch, images_B: Tensor, partner_labels_B: Tensor, shares_B: Tensor
) -> MicroBatch:
    """Make a micro-batch of mixed images, with the labels of examples and partners mixed by their shares."""
    num_labels = technique.run_.model.config.num_labels  # type: ignore[union-attr]
    own_BV, others_BV = (_soft(technique, labels, num_labels) for labels in (micro.inputs["labels"], partner_labels_B))
    inputs = {**micro.inputs, "pixel_values": images_B, "labels": torch.lerp(others_BV, own_BV, shares_B[:, None])}
    # Weights select our loss of examples; the model's own does not take soft labels.
    weights_B = torch.ones(len(micro.ids_B)) if micro.weights_B is None else micro.weights_B
    return micro._replace(inputs=inputs, weights_B=weights_B)


def _soft(technique: Technique, labels: Tensor, num_labels: int) -> Tensor:
    """Turn classes, (B,), into shares of classes, (B, V); keep shares."""
    if labels.is_floating_point():
        return labels
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"{technique!r} does not support labels outside 0 to {num_labels - 1} because they cannot be mixed. "
            "Remove examples without a class."
        )
    return F.one_hot(labels.reshape(-1), num_labels).float()
