"""Start with small images, and enlarge them as training progresses.

A model learns coarse features early in training, and small images show these.  The cost of a step is proportional to
its pixels:

    scale(p) = ``start``                                                        for p < ``delay``
             = ``start`` + (1 - ``start``) * (p - ``delay``) / (``end`` - ``delay``)   for p < ``end``;  1 from then on

Height and width are scaled by it, and rounded up to multiples of ``multiple`` and of the model's patches.  A model with
position embeddings is asked to interpolate them (``interpolate_pos_encoding``).

Recommendation: Use ResolutionWarmup if you classify images of 160 pixels or more and your loader keeps up with smaller
ones.
When to use: Image classification at 160 pixels and more, with a loader that keeps up with smaller images.  An estimate
from published recipes is 1.2 to 1.4 times faster; all these recipes test at the full size or above.
When not to use:
- Images of 32 pixels.
- Runs that wait for the loader.
- Static-shape compilation, unless ``multiple`` is large.
- Batch normalization, if its statistics cannot settle after ``end``: they shift with the size.
Differences from the paper:
- The schedule follows progress instead of epochs, so a budget of time spends the saved time on more steps.
- Augmentation gets stronger by its own ``ramp``.
References: Tan and Le (2021), EfficientNetV2, https://arxiv.org/abs/2104.00298; the schedule is that of progressive
resizing in Composer.
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
    """Return height and width at ``progress``, as a share of the full ones; never falling."""
    if progress >= end:
        return 1.0
    return start + (1 - start) * max(progress - delay, 0.0) / (end - delay) if progress > delay else start


def patch_multiple(config: Any) -> int:
    """Return the number of pixels that heights and widths must be multiples of for the model's patches."""
    sizes = getattr(config, "patch_size", None) or getattr(config, "patch_sizes", None) or 1
    return math.lcm(*(sizes if isinstance(sizes, list | tuple) else [sizes]))


@dataclass(eq=False)
class ResolutionWarmup(Technique):
    """Train on reduced images that grow to their full size.

    Args:
        start: Initial height and width, as a share of the full ones, in (0, 1].
        delay: Progress, in [0, 1], until which images keep their initial size.
        end: Progress, in (0, 1], from which images have their full size.
        multiple: Number of pixels, at least 1, that heights and widths are multiples of.
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
                f"{self!r} does not support {type(model).__name__} because {fixed[0]} has one size of images and its "
                "forward takes no interpolate_pos_encoding. Remove ResolutionWarmup."
            )
        self.unit_ = math.lcm(self.multiple, patch_multiple(model.config))
        self.trained_, self.read_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Resize every image to the present size."""
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
        """Report the share of the pixels that was trained on, on this rank."""
        return {"pixels": self.trained_ / self.read_ if self.read_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["pixels"] < 1
