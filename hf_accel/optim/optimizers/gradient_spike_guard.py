"""Skip an update if its gradient is not finite or far larger than usual.

One bad batch can undo hours: a NaN ends a run, and a spike in the loss costs the steps until the model has recovered.
An update is refused if the norm g of its gradient, before clipping, is not finite or

    g > max_ratio * exp(m),    m <- m + (log g - m) / min(t, 50)   over accepted updates t

that is, far above the running geometric mean.  Refused updates move neither weights nor moments, and are counted.  If
``patience`` of them follow one another, the run stops with a clear message.

Recommendation: Use GradientSpikeGuard if you train in mixed precision, on unread data, or for long.
When to use: Mixed precision, data that nobody has read, long runs.
When not to use: A healthy run, in which it saves no time and reads the norm from the accelerator at every step.
Defaults: The values are not taken from a paper.
Differences from the paper: The update is skipped at once instead of after a rewind.
Reference: Chowdhery et al. (2022), PaLM, section 5.1, https://arxiv.org/abs/2204.02311, on skipping batches around loss
spikes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
from torch import Tensor

from hf_accel.preserve import copies_of_buffers, restore_buffers
from hf_accel.technique import Diverged, Technique

MEMORY = 50
"""Number of updates in the running mean; a tenth of them must be accepted before a size is refused."""


def is_spike(norm: float, mean_log_norm: float, seen: int, max_ratio: float) -> bool:
    """Return whether a gradient's norm is not finite, or far above the geometric mean of those before it."""
    if not math.isfinite(norm):
        return True
    return seen >= MEMORY // 10 and norm > max_ratio * math.exp(mean_log_norm)


@dataclass(eq=False)
class GradientSpikeGuard(Technique):
    """Refuse updates by the norm of their gradient.

    Args:
        max_ratio: Norm, relative to the running mean, above which an update is refused, above 1; infinity refuses only
        NaN and inf.
        patience: Number of refused updates in a row that ends the run, at least 1.
    """

    max_ratio: Annotated[float, at.Gt(1)] = 10.0
    patience: Annotated[int, at.Ge(1)] = 10
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"max_ratio": math.inf}
    variations: ClassVar = {"max_ratio": 1.01}
    refused_backends: ClassVar = {"zero": "it updates the weights within the backward pass"}
    expected_failed_checks: ClassVar = {
        "check_every_option_matters": "patience acts only after several refused updates in a row, which end the run"
    }
    counters: ClassVar = ("mean_log_norm", "seen", "refused", "in_a_row")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.run_.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. "
                "Remove GradientSpikeGuard, or use DDP or FSDP2."
            )
        if self.run_.accelerator.scaler is not None and not args.max_grad_norm:
            raise ValueError(
                f"{self!r} does not support fp16 with max_grad_norm=0 because gradients are still scaled. "
                "Set max_grad_norm, or bf16=True."
            )
        self.mean_log_norm_, self.seen_, self.refused_, self.in_a_row_ = 0.0, 0, 0, 0

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        self.buffers_ = copies_of_buffers(model)

    def accept_step(self, grad_norm: Tensor | float) -> bool:
        norm = float(grad_norm)
        if not math.isfinite(norm) and self.run_.accelerator.scaler is not None:
            restore_buffers(self.buffers_)
            return True  # the scaler skips the update and lowers its scale
        if is_spike(norm, self.mean_log_norm_, self.seen_, self.max_ratio):
            restore_buffers(self.buffers_)
            self.refused_ += 1
            self.in_a_row_ += 1
            if self.in_a_row_ >= self.patience:
                raise Diverged(
                    f"{self!r}: {self.in_a_row_} updates in a row were refused, the last for a norm of {norm:g}. "
                    "Lower learning_rate, or check the data of these steps."
                )
            return False
        self.in_a_row_ = 0
        self.seen_ += 1
        self.mean_log_norm_ += (math.log(max(norm, 1e-30)) - self.mean_log_norm_) / min(self.seen_, MEMORY)
        return True

    def report(self) -> Mapping[str, Any]:
        return {"accepted": self.seen_, "refused": self.refused_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["accepted"] > 0
