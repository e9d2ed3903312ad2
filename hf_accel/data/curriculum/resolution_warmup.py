"""Resolution warm-up: begin with small images, and enlarge them.

Early in training a model learns coarse things, which small images show.  A step costs in proportion to its pixels:

    scale(p) = ``start``                                                        for p < ``delay``
             = ``start`` + (1 - ``start``) * (p - ``delay``) / (``end`` - ``delay``)   for p < ``end``;  1 from then on

Height and width are scaled so, and rounded up to multiples of ``multiple`` and of the model's patches.  Where a model
embeds positions, it is asked to interpolate them (``interpolate_pos_encoding``).

Reference: Tan and Le (2021), EfficientNetV2, https://arxiv.org/abs/2104.00298; the schedule is that of progressive
resizing in Composer.  Departures: progress in place of epochs, so that under a budget of time the saved time is spent
on more steps; augmentation follows by its own ``ramp``.

When to use: image classification at 160 pixels and more, where the loader keeps up with smaller images; 1.2 to 1.4
times faster is estimated from published recipes, all of which test at the full size or above.
When not to use: images of 32 pixels; where reading the images is what takes the time; with static-shape compilation,
unless ``multiple`` is large.  Statistics of batch normalization shift with the size, and settle after ``end``.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
import torch.nn.functional as F

from hf_accel.adapters import unwrapped
from hf_accel.features.augmentation import images_of, refuse_other_than_images
from hf_accel.technique import Fraction, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch

FIXED = ("position", "pos_embed", "attention_bias")
"""Parts of the names of parameters that belong to one size of image."""


def scale_at(progress: float, *, start: float, delay: float, end: float) -> float:
    """Height and width at ``progress``, as a share of the full ones; never falling."""
    if progress >= end:
        return 1.0
    return start + (1 - start) * max(progress - delay, 0.0) / (end - delay) if progress > delay else start


def patch_multiple(config: Any) -> int:
    """What heights and widths must be multiples of, for the model's patches."""
    sizes = getattr(config, "patch_size", None) or getattr(config, "patch_sizes", None) or 1
    return math.lcm(*(sizes if isinstance(sizes, list | tuple) else [sizes]))


@dataclass(eq=False)
class ResolutionWarmup(Technique):
    """Trains on reduced images, larger and larger, until they are whole.

    Args:
        start: First height and width, as a share of the full ones, in (0, 1].
        delay: Progress, in [0, 1], until which images keep their first size.
        end: Progress, in (0, 1], from which images are whole.
        multiple: Heights and widths are multiples of this number of pixels, at least 1.
    """

    start: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # Composer's
    delay: Fraction = 0.5  # Composer's
    end: Annotated[float, at.Interval(gt=0, le=1)] = 0.8  # Composer's
    multiple: Annotated[int, at.Ge(1)] = 4  # Composer's
    modality: ClassVar = "image"
    neutral: ClassVar = {"start": 1.0}
    rank_counters: ClassVar = ("trained", "read")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        assert model is not None
        refuse_other_than_images(self, model)
        model = unwrapped(model)
        self.interpolates_ = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        fixed = [name for name, _ in model.named_parameters() if any(part in name for part in FIXED)]
        if fixed and not self.interpolates_:
            raise ValueError(
                f"{self!r}: {type(model).__name__} has {fixed[0]} for one size of images, and its forward takes no "
                "interpolate_pos_encoding. Leave it out."
            )
        self.unit_ = math.lcm(self.multiple, patch_multiple(model.config))
        self.trained_, self.read_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Every image at the present size."""
        assert self.run_ is not None
        scale = scale_at(self.run_.clock.progress, start=self.start, delay=self.delay, end=self.end)
        micros = []
        for micro in batch.micro_batches:
            images_B = images_of(self, micro)
            full = images_B.shape[2:]
            size = [min(math.ceil(side * scale / self.unit_) * self.unit_, side) for side in full]
            self.read_ += len(images_B) * full.numel()
            self.trained_ += len(images_B) * math.prod(size)
            if size != list(full):
                exact_B = images_B.to(torch.promote_types(images_B.dtype, torch.float32))  # CPUs resize no bfloat16
                smaller_B = F.interpolate(exact_B, size, mode="bilinear", antialias=True).to(images_B.dtype)
                inputs: dict[str, Any] = {**micro.inputs, "pixel_values": smaller_B}
                if self.interpolates_:
                    inputs["interpolate_pos_encoding"] = True
                micro = micro._replace(inputs=inputs)
            micros.append(micro)
        return dataclasses.replace(batch, micro_batches=micros)

    def report(self) -> Mapping[str, Any]:
        """The share of the pixels that was trained on, on this rank."""
        return {"pixels": self.trained_ / self.read_ if self.read_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["pixels"] < 1
