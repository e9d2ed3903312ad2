"""Prove assumptions about the loss on the first steps of a run, before code splits or divides it."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
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
from hf_accel.losses.proof import EXAMPLES, FULL_PRECISION, HALF_PRECISION
from hf_accel.preserve import buffers_kept, evaluation_mode, random_state_kept
from hf_accel.stream.indexed import StepStream

MOST_TRIALS = 3
"""Steps on which to find out which mean a loss is, if the earlier ones do not tell."""


class LossProof:
    """Compare the computed loss with our assumptions about it.

    Each of the three assumptions is checked when a step first relies on it:

    - A head gives the model's own loss.  The first step compares the two in evaluation mode, so neither weights,
      statistics nor generators change.
    - A loss that receives the number of items is divided by it.  The first divided step shows this by the derivative.
      Any other loss is a mean, and a step's loss is the mean over its micro-batches, weighted by their items.
    - A mean is one over labels that count, or over examples.  Two micro-batches show it, read together and apart.
    """

    def __init__(self, host: TrainerView, roster: Roster, ranks: Ranks):
        self.host, self.roster, self.ranks = host, roster, ranks
        self.head_is_proved = False
        self.loss_is_mean: bool | None = None
        """True if the loss, or one of its terms, ignores the number of items; None while this is unknown."""
        self._mean_over: str | None = None
        self._trials = 0

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
        found = None
        with self._undisturbed() as model:
            for micro in batch.micro_batches:
                inputs = self.host.prepare_inputs(micro.model_inputs)
                outputs = model(**inputs)
                if micro.ids_B[0] >= 0 and found is None:
                    found = losses.compare_losses(head, outputs, inputs, len(micro.ids_B), half=self._is_half)
        return found

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[Any]:
        """Give the model in evaluation mode, and restore everything that a forward pass changes."""
        model: Any = self.host.model_wrapped
        with (
            torch.no_grad(),
            evaluation_mode(model),
            buffers_kept(self.host.model),
            random_state_kept(self.host.args.device),
            self.host.metrics_kept(),
        ):
            yield model

    @property
    def _is_half(self) -> bool:
        """Return whether losses are computed with less than float32."""
        half = self.host.accelerator.mixed_precision != "no"
        return half or any(parameter.dtype.itemsize < 4 for parameter in self.host.model.parameters())

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

    def parts_of_mean(self, batch: StepBatch, stream: StepStream | None) -> list[tuple[MicroBatch, float]]:
        """Return the micro-batches, each with the divisor of its mean that gives the mean of the step.

        The divisor is 1 / its share of the step.  One process omits empty shares, because a mean of nothing is no
        number.

        Args:
            stream: Stream of the run; None if the batch comes from another one.
        """
        if len(batch.micro_batches) > 1 and stream is not None:
            self._prove_mean(batch, stream.read)
        sizes = [self._size(micro) if micro.ids_B[0] >= 0 else 0 for micro in batch.micro_batches]
        if not sum(sizes):
            return [(micro, float(len(sizes))) for micro in batch.micro_batches]
        omits = self.ranks.world_size == 1 and "observe" not in self.roster.answered
        parts = zip(batch.micro_batches, sizes, strict=True)
        return [(micro, sum(sizes) / n if n else math.inf) for micro, n in parts if n or not omits]

    def _size(self, micro: MicroBatch) -> int:
        """Return the number of items or examples that a micro-batch's loss is a mean of."""
        sizes = self._sizes(micro)
        return sizes.get(next(iter(sizes)) if self._mean_over is None else self._mean_over, 0)

    def _sizes(self, micro: MicroBatch) -> dict[str, int]:
        return losses.sizes_of_mean(micro.inputs, len(micro.ids_B), shifted=self._shifted)

    @functools.cached_property
    def _shifted(self) -> bool:
        """Return whether the first label of a row predicts nothing; Trainer does not know a subclass by its name."""
        return self.host.loss_shifts_labels or losses.kind_of(unwrapped(self.host.model)) == "causal LM"

    def _prove_mean(self, batch: StepBatch, read: Callable[[StepPlan], StepBatch]) -> None:
        """Find out what a loss is a mean of: labels or examples.

        Compare the loss of a few micro-batches, read together, with the means of their losses.  Warn if it is none of
        these, and if micro-batches are smaller than the user's batches.
        """
        real = batch.real_micro_batches
        sizes = {name: [self._sizes(micro).get(name, 0) for micro in real] for name in self._sizes(real[0])}
        rows = sizes[EXAMPLES]
        shares = {name: [n / b for n, b in zip(found, rows, strict=True)] for name, found in sizes.items()}
        extremes = {share.index(pick(share)) for share in shares.values() for pick in (min, max) if len(set(share)) > 1}
        smaller = self._trials == 0 and max(rows) < self.host.train_batch_size
        if self._trials == MOST_TRIALS or not self.ranks.sum([float(bool(extremes) or smaller)])[0]:
            return
        self._trials += 1
        chosen = sorted(extremes or {0, len(real) - 1})
        ids = torch.cat([real[i].ids_B for i in chosen])
        with self._undisturbed():
            apart = [self._loss_of(read, batch.plan, real[i].ids_B) for i in chosen]
            together, again = (self._loss_of(read, batch.plan, ids, draw) for draw in (0, 1))
        tells = math.isclose(together, again, rel_tol=1e-6)  # neither the collator nor the loss draws
        found = [
            losses.error_of_mean(together, apart, [n[i] for i in chosen]) if tells else 0.0 for n in sizes.values()
        ]
        errors = dict(zip(sizes, self.ranks.sum(found), strict=True))
        if math.isinf(least := min(errors.values())):
            return
        self._mean_over = min(errors, key=lambda name: errors[name])
        noise, largest = (HALF_PRECISION, HALF_PRECISION) if self._is_half else (1e-5, FULL_PRECISION)
        if sum(error <= least + noise for error in errors.values()) == 1:
            self._trials = MOST_TRIALS
        if least > largest * self.ranks.world_size:
            self._mean_over, self._trials = EXAMPLES, MOST_TRIALS
            if smaller:
                mean = sum(loss * rows[i] for loss, i in zip(apart, chosen, strict=True)) / len(ids)
                warnings.warn(
                    f"The loss of {len(ids)} examples is {together:.4f}, not the mean of its micro-batches' losses, "
                    f"{mean:.4f}, so updates differ from those of whole batches. Set "
                    f"micro_batch_size={self.host.train_batch_size}.",
                    stacklevel=2,
                )

    def _loss_of(self, read: Callable[[StepPlan], StepBatch], plan: StepPlan, ids_B: Tensor, draw: int = 0) -> float:
        """Return the loss of some examples in one micro-batch; each ``draw`` has its own random key."""
        plan = StepPlan(plan.epoch, ids_B, None, len(ids_B), seed=plan.seed + draw)
        inputs = self.host.prepare_inputs(read(plan).micro_batches[0].model_inputs)
        with self.host.compute_loss_context_manager():
            return float(self.host.compute_loss(self.host.model_wrapped, inputs))

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


def _has_soft_labels(inputs: Mapping[str, Any]) -> bool:
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() > 1
