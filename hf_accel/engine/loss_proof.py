"""Prove assumptions about the loss on the first steps of a run, before code splits or divides it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from hf_accel import host as hosts
from hf_accel import losses
from hf_accel.adapters import unwrapped
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.engine.memory import StepSnapshot
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView
from hf_accel.preserve import buffers_kept, evaluation_mode, random_state_kept


class LossProof:
    """Compare the computed loss with our assumptions about it.

    Each of these assumptions is checked when a step first relies on it:

    - A head gives the model's own loss.  The first step compares the two in evaluation mode, so neither weights,
      statistics nor generators change.
    - A loss that receives the number of items is divided by it.  The first divided step shows this by the derivative.
      Any other loss is a mean, and a step's loss is the mean over its micro-batches, weighted by their items.
    - A mean is that of its parts.  The first step in micro-batches smaller than Trainer's shows it for two halves.
    """

    def __init__(self, host: TrainerView, roster: Roster, ranks: Ranks):
        self.host, self.roster, self.ranks = host, roster, ranks
        self.head_is_proved = False
        self.loss_is_mean: bool | None = None
        """True if the loss, or one of its terms, ignores the number of items; None while this is unknown."""
        self.mean_is_proved = False

    def prove_head(self, head: losses.Head, batch: StepBatch, read: Callable[[StepPlan], StepBatch]) -> bool:
        """Return whether a head gives the model's own loss; raise if it does not and a technique needs it.

        Args:
            read: Read a plan, on this rank alone.
        """
        self.head_is_proved = True
        if "loss_head" in self.roster.answered:  # one example: the technique may exist to save memory for logits
            head, plan = losses.head_of(self.host.model), batch.plan
            batch = read(StepPlan(plan.epoch, plan.ids_N[:1], None, 1, seed=plan.seed))
        elif any(_has_soft_labels(micro.inputs) for micro in batch.micro_batches):
            batch = read(batch.plan)  # a technique mixed the labels, which the model's own loss may not take
        if self.host.label_smoother is not None:  # Trainer then computes the loss from the logits
            return True
        found = self._difference(head, batch)
        if not self.ranks.sum([float(found is not None)])[0]:
            return True
        needing = [t for t in self.roster.techniques if t.implemented_hooks() & hosts.NEEDS_EXAMPLE_LOSSES]
        if needing:
            theirs, ours = found or (math.nan, math.nan)
            raise ValueError(
                f"{', '.join(map(repr, needing))} does not support the loss of "
                f"{type(unwrapped(self.host.model)).__name__} because it is {theirs:.4f} in the first step, but "
                f"{ours:.4f} for a {head.kind} model. Pass the loss of each example as example_loss_func=."
            )
        return False

    def _difference(self, head: losses.Head, batch: StepBatch) -> tuple[float, float] | None:
        model: Any = self.host.model_wrapped
        found = None
        with (
            torch.no_grad(),
            evaluation_mode(model),
            buffers_kept(self.host.model),
            random_state_kept(self.host.args.device),
        ):
            for micro in batch.micro_batches:
                inputs = self.host.prepare_inputs(micro.model_inputs)
                outputs = model(**inputs)
                if micro.ids_B[0] >= 0 and found is None:
                    found = losses.compare_losses(head, outputs, inputs, len(micro.ids_B), half=self._half)
        return found

    def is_mean(self, num_items: Any) -> bool:
        """Return whether each micro-batch gives a mean, which Trainer divides."""
        return self.host.loss_is_scaled_for_ga is False or (num_items is None and not self.host.loss_is_scaled_for_ga)

    @contextlib.contextmanager
    def means(self) -> Iterator[None]:
        """Let Trainer divide the result of any loss function."""
        given = self.host.loss_is_scaled_for_ga
        self.host.loss_is_scaled_for_ga = False
        try:
            yield
        finally:
            self.host.loss_is_scaled_for_ga = given

    def shares(self, batch: StepBatch) -> list[tuple[MicroBatch, float]]:
        """Return micro-batches with the divisor of their mean that gives the mean of the step: 1 / share of the items.

        A mean over no item is not a number, and has no share.  It is left out, unless other ranks wait for the pass.
        """
        micros = batch.micro_batches
        items = [
            losses.items_of_mean(micro.inputs, len(micro.ids_B), shifted=self._shifted) if micro.ids_B[0] >= 0 else 0
            for micro in micros
        ]
        if not sum(items):
            return [(micro, float(len(micros))) for micro in micros]
        kept = [(micro, n) for micro, n in zip(micros, items, strict=True) if n or self.ranks.world_size > 1]
        return [(micro, sum(items) / n if n else math.inf) for micro, n in kept]

    @property
    def _half(self) -> bool:
        dtype = next(self.host.model.parameters()).dtype
        return self.host.accelerator.mixed_precision != "no" or dtype != torch.float32

    @functools.cached_property
    def _shifted(self) -> bool:
        """Return whether the first label of a row predicts nothing; Trainer does not know a subclass by its name."""
        return self.host.loss_shifts_labels or losses.kind_of(unwrapped(self.host.model)) == "causal LM"

    def prove_mean(self, plan: StepPlan, stream: Any) -> None:
        """Raise ValueError if the loss of two micro-batches is not the mean of the losses of two halves of them.

        Micro-batches that are Trainer's own batches need no proof, because its accumulation means such a mean.

        Losses over all pairs of examples and means with class weights are not.  Random losses, and examples that are
        not rows of tensors, tell nothing.  Terms that balance experts also balance them in parts.
        """
        size = plan.micro_batch_size
        if self.mean_is_proved or size >= self.host.train_batch_size:
            return
        (micro,) = stream.read(
            StepPlan(plan.epoch, plan.ids_N[: 2 * size], None, 2 * size, seed=plan.seed)
        ).micro_batches
        config = getattr(unwrapped(self.host.model), "config", None)
        balances = any(getattr(config, setting, False) for setting in losses.ADDED_TERMS)
        number, whole = len(micro.ids_B), micro.model_inputs
        middle = number // 2
        halves = [_rows(whole, number, slice(middle)), _rows(whole, number, slice(middle, number))]
        if number > 1 and not balances and None not in halves:
            with random_state_kept(self.host.args.device):
                found, again, *parts = (self._loss_of(inputs) for inputs in (whole, whole, *halves))
            counted = zip(halves, (middle, number - middle), strict=True)
            items = [losses.items_of_mean(half, rows, shifted=self._shifted) for half, rows in counted]
            shares = [loss * n for loss, n in zip(parts, items, strict=True) if n]
            mean = sum(shares) / max(sum(items), 1)
            if found == again and shares and not losses.agree(found, mean, half=self._half):
                raise ValueError(
                    f"micro_batch_size={size} does not support the loss of "
                    f"{type(unwrapped(self.host.model)).__name__} because it is {found:.4f} for {number} examples, "
                    f"but {mean:.4f} as the mean of two halves. Set micro_batch_size=None, or set "
                    f"per_device_train_batch_size={size} and gradient_accumulation_steps to train on means."
                )
        self.mean_is_proved = True

    def _loss_of(self, inputs: Any) -> float:
        """Return the trainer's loss in evaluation mode; NaN if it has none."""
        model = self.host.model_wrapped
        with torch.no_grad(), evaluation_mode(model), buffers_kept(self.host.model), self.host.metrics_kept():
            try:
                return float(self.host.compute_loss(model, dict(self.host.prepare_inputs(inputs))).mean())
            except (KeyError, ValueError):
                return math.nan

    def must_watch(self, batch: StepBatch, num_items: Any) -> bool:
        """Return whether the next step is the first to show if the loss is divided by the number of items."""
        divided = len(batch.micro_batches) > 1 or self.ranks.world_size > 1
        return (
            divided
            and self.loss_is_mean is None
            and isinstance(num_items, Tensor)
            and self.host.loss_is_scaled_for_ga is None
            and self.host.accelerator.distributed_type != DistributedType.DEEPSPEED  # it scales by itself
        )

    def watch(self, attempt: Callable[[Any], Tensor], num_items: Any, before: StepSnapshot) -> Tensor:
        """Return ``attempt(num_items)``; repeat it with means if the loss is not divided by the number of items."""
        items = num_items.detach().to(torch.float32, copy=True).requires_grad_()
        loss = attempt(items)
        scaler = self.host.accelerator.scaler
        divided = losses.is_divided_by(loss, items, 1.0 if scaler is None else scaler.get_scale())
        mean, known = self.ranks.sum([float(divided is False), float(divided is not None)])
        if not known:
            return loss
        self.loss_is_mean = mean > 0
        if not self.loss_is_mean:
            return loss
        before.restore()
        return attempt(None)


def _rows(inputs: Any, number: int, part: slice) -> dict[str, Any] | None:
    """Return some of the rows of a batch, or None if one of its tensors does not have ``number`` rows."""
    if not isinstance(inputs, Mapping):
        return None
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if any(value.dim() == 0 or len(value) != number for value in tensors.values()):
        return None
    return {**inputs, **{name: value[part] for name, value in tensors.items()}}


def _has_soft_labels(inputs: Mapping[str, Any]) -> bool:
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() > 1
