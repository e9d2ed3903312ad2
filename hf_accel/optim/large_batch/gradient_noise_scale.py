"""Gradient noise scale: the batch size above which larger steps waste examples, measured while training.

The gradient of a step is the true gradient G plus noise that shrinks with the batch.  With the covariance Sigma of the
gradient of one example, a batch of

    B_simple = tr(Sigma) / |G|^2

examples has as much noise as signal.  Far below it, a step of twice as many examples saves half of the steps; far
above, it saves none, and the examples are wasted.  Both terms are estimated from what a step computes anyway: the
gradients h_i of its micro-batches, on all ranks, and their sum, the gradient of the step.  A micro-batch that has the
share w_i of the step's items has the mean w_i G, and micro-batches are independent, so without bias

    |G|^2     = (|sum_i h_i|^2 - sum_i |h_i|^2) / (1 - sum_i w_i^2)
    tr(Sigma) = batch_size * (|sum_i h_i|^2 - |G|^2)

One step says little; both are averaged, first over all steps and then with a half life, before they are divided.

The gradients of micro-batches are seen by hooks on the parameters, as they are added up and before the ranks exchange
them: there is no further pass, and training is the same bit for bit.  A step of one micro-batch on one rank cannot be
measured; if all are, it is said before training.

Reference: McCandlish et al. (2018), An Empirical Model of Large-Batch Training, https://arxiv.org/abs/1812.06162, with
its appendix A.1.  Departure: micro-batches may have different numbers of items.

When to use: to choose a batch size for many devices, or gradient accumulation.  It grows while the loss falls, often by
an order: look at the values over the run.
When not to use: as an exact number. Adam's best batch may be larger or smaller by an order, for it scales each
coordinate; of N examples without replacement, it comes out too large by a share of about B_simple / N. Where FSDP or
ZeRO exchange gradients before they can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_accel.optim.large_batch.noise_scale import NoiseScaleMeasurement
from hf_accel.technique import Positive


@dataclass(eq=False)
class GradientNoiseScale(NoiseScaleMeasurement):
    """Measures the gradient noise scale, in examples, and changes nothing.

    Args:
        half_life: Steps after which a measurement counts half, above 0.
    """

    half_life: Positive = 50
    fidelity: ClassVar = "exact"
