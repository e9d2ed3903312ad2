"""Keep weights and images in the memory format in which convolutions are fastest.

An image batch (B, C, H, W) may lie in memory as B, C, H, W or as B, H, W, C.  Convolution kernels on CPUs and tensor
cores work in the second order, and reorder a batch of the first one around every layer:

    address of x[b, c, h, w] = ((b H + h) W + w) C + c

This technique puts weights and inputs into that order once.  Shapes, names and results stay the same, up to rounding.

Recommendation: Use ChannelsLast if you train a convolutional network with mixed precision on a GPU.
When to use: Convolutional networks, above all with mixed precision on GPUs.
When not to use:
- CPUs, unless you measure: in float32 on one thread, ResNet-18 took 1.02 [0.97, 1.06] of the usual time, forward and
  backward, and a small ConvNeXt 0.96 [0.91, 1.02].
- Vision transformers, where the only convolution cuts the image into patches.
Differences from the paper: None.
References: the memory formats of PyTorch, https://pytorch.org/tutorials/intermediate/memory_format_tutorial.html;
Mosaic's Composer, https://docs.mosaicml.com/projects/composer/en/stable/method_cards/channels_last.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_accel.technique import Technique


def images_last(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Put images, (B, C, H, W), into memory with their channels last, as a forward pre-hook."""

    def reordered(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value.contiguous(memory_format=torch.channels_last)
        return value

    return tuple(map(reordered, args)), {name: reordered(value) for name, value in kwargs.items()}


@dataclass(eq=False)
class ChannelsLast(Technique):
    """Keep weights and images with their channels last in memory; needs no more than a plain Trainer."""

    fidelity: ClassVar = "exact"
    modality: ClassVar = "image"
    refused_backends: ClassVar = {"zero": "its flat partitions have no order of dimensions"}
    expected_failed_checks: ClassVar = {
        "two_ranks_equal_one[ddp]": "Trainer's own loss of an image classifier grows with the number of ranks"
    }

    def on_train_begin(self, args, state, control, model=None, optimizer: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.deepspeed_plugin is not None:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. Use DDP or FSDP2."
            )
        self.convolutions_: list[Any] = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        if not self.convolutions_:
            raise ValueError(
                f"{self!r} needs convolutions of images; {type(model).__name__} has none. Remove ChannelsLast."
            )
        self._lay_out(torch.channels_last, optimizer)
        self.hook_ = model.register_forward_pre_hook(images_last, with_kwargs=True)

    def on_train_end(self, args, state, control, optimizer: Any = None, **kwargs):
        self.hook_.remove()
        self._lay_out(torch.contiguous_format, optimizer)

    def _lay_out(self, memory_format: torch.memory_format, optimizer: Any) -> None:
        """Put weights into an order, with their moments: fused optimizers pair them by address."""
        for convolution in self.convolutions_:
            convolution.to(memory_format=memory_format)
            moments = {} if optimizer is None else optimizer.state.get(convolution.weight, {})
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.dim() == 4:
                    moments[name] = value.to(memory_format=memory_format)

    def report(self) -> Mapping[str, Any]:
        """Report the number of convolutions with reordered weights."""
        return {"convolutions": len(self.convolutions_)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["convolutions"] > 0
