"""Measure the batch size above which larger steps waste examples, while the run trains.

The gradient of a step is the true gradient G plus noise that shrinks with the batch.  With the covariance Sigma of the
gradient of one example, a batch of

    B_simple = tr(Sigma) / |G|^2

examples has as much noise as signal.  Far below it, a step of twice as many examples saves half of the steps.  Far
above, it saves none, and the examples are wasted.

Both terms are estimated from quantities that a step computes anyway.  They are the gradients h_i of its micro-batches,
on all ranks, and their sum, the gradient of the step.  A micro-batch with the share w_i of the step's items has the
mean w_i G, and micro-batches are independent.  So without bias

    |G|^2     = (|sum_i h_i|^2 - sum_i |h_i|^2) / (1 - sum_i w_i^2)
    tr(Sigma) = batch_size * (|sum_i h_i|^2 - |G|^2)

One step says little; both are averaged, first over all steps and then with a half-life, before they are divided.

Hooks on the parameters see the gradients of micro-batches before the ranks exchange them.  So there is no further pass,
and training is the same bit for bit.  A step of one micro-batch on one rank cannot be measured.  If all steps are like
that, a warning says so before training.

Recommendation: Use GradientNoiseScale if you have to choose a batch size for many devices or for gradient accumulation.
When to use: The choice of a batch size for many devices, or of gradient accumulation.  The noise scale grows while the
loss falls, often by an order, so look at the values over the run.
When not to use:
- As an exact number.  Adam's best batch may be larger or smaller by an order, because Adam scales each coordinate.
- Data sets of N examples without replacement, if B_simple is near N: it is too large by a share of about B_simple / N.
- FSDP or ZeRO, which exchange gradients before hooks can see them.
Defaults: The half-life is not taken from a paper.
Differences from the paper: Micro-batches may have different numbers of items.
Reference: McCandlish et al. (2018), An Empirical Model of Large-Batch Training, https://arxiv.org/abs/1812.06162, with
its appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_accel.technique import Positive
from hf_accel.updates.noise_scale import NoiseScaleMeasurement


@dataclass(eq=False)
class GradientNoiseScale(NoiseScaleMeasurement):
    """Measure the gradient noise scale, in examples, and change nothing.

    Args:
        half_life: Steps after which a measurement counts half, above 0.
    """

    half_life: Positive = 50
    fidelity: ClassVar = "exact"
