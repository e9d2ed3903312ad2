"""Use losses that the user gives, as functions or heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.losses.heads import ExampleLosses, ExampleLossFunc, Head, row_numbers, wide


@dataclass(frozen=True)
class FunctionHead(Head):
    """A loss function of the user.

    Every example counts as one item, because other items are unknown before the forward pass.  If the function returns
    items and a mask, an example's loss is the mean over its counted items.  The function may use anything, so labels
    stay in the inputs.  It smooths its labels itself, like ``Trainer``'s ``compute_loss_func``.
    """

    example_loss_func: ExampleLossFunc

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        assert num_examples is not None
        return torch.tensor([num_examples])

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        losses = self.example_loss_func(outputs, inputs)
        if isinstance(losses, tuple):
            losses_BL, mask_BL = losses
            mask_BL = mask_BL.bool()
            losses = losses_BL.masked_fill(~mask_BL, 0).sum(1) / mask_BL.sum(1).clamp(min=1)
            mask_B = mask_BL.any(1)
        else:
            mask_B = torch.ones_like(losses, dtype=torch.bool)
        if losses.shape != (num_examples,):
            raise ValueError(
                f"example_loss_func(...) returned the shape {tuple(losses.shape)}, not one loss for each of "
                f"{num_examples} examples. Return losses_B, or losses_BL and mask_BL."
            )
        losses_BL = losses.to(wide(losses.dtype)).unsqueeze(1)
        return ExampleLosses(losses_BL, mask_B.unsqueeze(1), row_numbers(losses_BL))


def head_from(example_loss_func: ExampleLossFunc | Head) -> Head:
    """Return the head of a user's loss: a `FunctionHead` of a function, or a head (from `head_of`, say) unchanged."""
    if isinstance(example_loss_func, Head):
        return example_loss_func
    return FunctionHead("example_loss_func", example_loss_func)
