"""Apply a few random changes to each image, with one number for their strength.

A rotated, shifted or recolored image shows the same thing, so a model that sees it learns to ignore such changes:

    ``num_ops`` times: one of 14 operations, drawn uniformly, at strength m / 30,
    m = ``magnitude`` * min(p / ``ramp``, 1) at progress p

The operations at full strength:

    nothing, stretch to full contrast, equalize the histogram, rotate (30 degrees), shear along x or y (0.3),
    shift along x or y (0.45 of the size), invert bright pixels (all), reduce the bits (to 4),
    blend with less or more color, contrast, brightness or sharpness (factors 0.1 and 1.9)

Seed, epoch and example determine operations and signs, so neither ranks nor micro-batches change anything.  Operations
run on the model's device, and at once on all images of a micro-batch that drew the same one.

Recommendation: Use RandAugment if you classify images over many epochs with a model that overfits.
When to use: Image classification over many epochs, with a model that overfits.  The authors report as much as from
searched policies (AutoAugment).
When not to use:
- Few epochs.
- Images with a class that depends on color, place or direction.
- Labels of places in the image.
- Loaders that augment already.
Differences from the paper:
- Pixels from beyond the image are black, as in kornia.
- The strength may rise, as EfficientNetV2 does with the resolution (https://arxiv.org/abs/2104.00298).
References: Cubuk et al. (2020), RandAugment: Practical automated data augmentation with a reduced search space,
https://arxiv.org/abs/1909.13719.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.features.augmentation import generators, images_of, refuse_other_than_images, strength
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

NAMES = (
    "nothing autocontrast equalize rotate shear_x shear_y shift_x shift_y solarize posterize color contrast "
    "brightness sharpness"
).split()
"""Operations, in the order of their numbers."""


def operations() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the operations; each takes images in [0, 1], (B, C, H, W), and signed strengths in [-1, 1], (B,)."""
    try:
        import kornia
    except ImportError as error:
        raise ImportError("RandAugment needs kornia. Run pip install 'hf-accel[vision]'.") from error
    enhance, geometry = kornia.enhance, kornia.geometry

    def along(axis: int, amount_B: Tensor) -> Tensor:
        return torch.stack([amount_B, torch.zeros_like(amount_B)][:: 1 if axis == 0 else -1], 1)

    def autocontrast(x: Tensor, _: Tensor) -> Tensor:
        flat = x.amax((2, 3), keepdim=True) == x.amin((2, 3), keepdim=True)
        return torch.where(flat, x, enhance.normalize_min_max(x))

    return {
        "nothing": lambda x, s: x,
        "autocontrast": autocontrast,
        "equalize": lambda x, s: enhance.equalize(x),
        "rotate": lambda x, s: geometry.rotate(x, 30 * s),
        "shear_x": lambda x, s: geometry.shear(x, along(0, 0.3 * s), align_corners=True),
        "shear_y": lambda x, s: geometry.shear(x, along(1, 0.3 * s), align_corners=True),
        "shift_x": lambda x, s: geometry.translate(x, along(0, 0.45 * s * x.shape[3])),
        "shift_y": lambda x, s: geometry.translate(x, along(1, 0.45 * s * x.shape[2])),
        "solarize": lambda x, s: enhance.solarize(x, 256 / 255 * (1 - s.abs())),
        "posterize": lambda x, s: enhance.posterize(x, 8 - (4 * s.abs()).round().int()),
        "color": lambda x, s: enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * s),
        "contrast": lambda x, s: enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s),
        "brightness": lambda x, s: enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s),
        "sharpness": lambda x, s: enhance.sharpness(x, 1 + 0.9 * s),
    }


@dataclass(eq=False)
class RandAugment(Technique):
    """Train on images after a few random changes.

    Args:
        num_ops: Changes per image, at least 0.
        magnitude: Strength of a change, from 0 to 30.
        ramp: Progress, in [0, 1], until which the magnitude rises linearly from 0; 0: full from the start.
    """

    num_ops: Annotated[int, at.Ge(0)] = 2  # the paper's, for ImageNet
    magnitude: Annotated[float, at.Interval(ge=0, le=30)] = 9.0  # the paper's, for ImageNet
    ramp: Fraction = 0.0  # no ramp, as in the paper
    modality: ClassVar = "image"
    neutral: ClassVar = {"num_ops": 0}
    rank_counters: ClassVar = ("changed", "seen")

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_other_than_images(self, model)
        self.operations_ = operations()
        processor = getattr(processing_class, "image_processor", processing_class)
        normalized = getattr(processor, "do_normalize", False)
        self.mean_, self.std_ = (processor.image_mean, processor.image_std) if normalized else ([0.0], [1.0])
        self.changed_, self.seen_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Apply its own changes to each image."""
        self.seen_ += sum(len(micro.ids_B) for micro in batch.micro_batches)
        if self.num_ops == 0:
            return batch
        level = self.magnitude / 30 * strength(self)
        micros = []
        for micro in batch.micro_batches:
            normalized_B = images_of(self, micro)
            mean, std = (normalized_B.new_tensor(values)[:, None, None] for values in (self.mean_, self.std_))
            images_B = normalized_B * std + mean
            if images_B.min() < -0.02 or images_B.max() > 1.02:
                raise ValueError(
                    f"{self!r} needs pixel_values in [0, 1] before normalization. Set processing_class= "
                    "of the trainer to the image processor with the image_mean and image_std of the data."
                )
            images_B = images_B.clamp(0, 1)
            drawn = generators(self, batch.plan, micro)
            for _ in range(self.num_ops):
                chosen_B = torch.tensor([int(generator.integers(len(NAMES))) for generator in drawn])
                levels_B = torch.tensor([level * (1 - 2 * int(generator.integers(2))) for generator in drawn])
                self.changed_ += int((chosen_B != 0).sum())
                for operation in chosen_B.unique().tolist():
                    rows = (chosen_B == operation).nonzero().squeeze(1)
                    levels = levels_B[rows].to(images_B)
                    images_B[rows] = self.operations_[NAMES[operation]](images_B[rows], levels).to(images_B)
            micros.append(micro._replace(inputs={**micro.inputs, "pixel_values": (images_B - mean) / std}))
        return dataclasses.replace(batch, micro_batches=micros)

    def report(self) -> Mapping[str, Any]:
        """Report the mean number of changes per image, on this rank."""
        return {"changes": self.changed_ / max(self.seen_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["changes"] > 0
