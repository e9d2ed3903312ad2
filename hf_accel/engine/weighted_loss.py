"""Compute the loss of a micro-batch from the losses of its examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_accel import losses
from hf_accel.batch import MicroBatch
from hf_accel.engine.meter import Meter
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView


def weighted_loss(
    host: TrainerView,
    roster: Roster,
    meter: Meter,
    head: losses.Head,
    model: nn.Module,
    inputs: Any,
    micro: MicroBatch,
    items_K: Tensor,
) -> tuple[Tensor, Any, losses.ExampleLosses]:
    """Return the loss, the outputs and the example losses.

    Techniques weight the loss, and the items of the whole step divide it.
    """
    outputs = model(**head.without_labels(host.model, inputs))
    smoothing = host.args.label_smoothing_factor if host.label_smoother is not None else 0.0
    example = head.losses(outputs, inputs, len(micro.ids_B), label_smoothing=smoothing)
    weight_B = None if micro.weights_B is None else micro.weights_B.to(example.losses_BL.device)
    weight_BL = None
    for technique in roster.with_hook("loss_weights"):
        with meter.charge(technique):
            weight = technique.loss_weights(example, micro.ids_B)
        if weight is None or weight.shape == micro.ids_B.shape:
            weight_B = _product(weight_B, weight)
        elif weight.shape == example.losses_BL.shape:
            weight_BL = _product(weight_BL, weight)
        else:
            raise ValueError(
                f"{technique!r}: loss_weights returned shape {tuple(weight.shape)}. Return a weight for each example, "
                f"{tuple(micro.ids_B.shape)}, or for each item, {tuple(example.losses_BL.shape)}."
            )
    loss = losses.weighted_mean(example, items_K, weight_B, weight_BL)
    for technique in roster.with_hook("extra_loss"):
        with meter.charge(technique):
            if (extra := technique.extra_loss(model, inputs, outputs)) is not None:
                if extra.dim():
                    raise ValueError(f"{technique!r}: extra_loss returned shape {tuple(extra.shape)}. Return a sum.")
                loss = loss + extra / items_K.sum()
    if host.args.average_tokens_across_devices:
        loss = loss * host.accelerator.num_processes  # DDP averages over ranks
    return loss, outputs, example


def _product(weight: Tensor | None, factor: Tensor | None) -> Tensor | None:
    if weight is None or factor is None:
        return weight if factor is None else factor
    return weight * factor
