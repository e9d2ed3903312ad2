"""Run one step: draw, transform and count a step batch, and accumulate its gradient over micro-batches.

The step uses the model's own loss if it is correct.  Otherwise, techniques weight the losses of the examples.  The sum
is then divided by the items of the whole step, over micro-batches and ranks.

Shape suffixes: ``B`` examples, ``L`` items of an example, ``K`` terms of the loss.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_accel import host as hosts
from hf_accel import losses
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.engine import batch_sizes as sizes
from hf_accel.engine import memory
from hf_accel.engine.loss_proof import LossProof
from hf_accel.engine.meter import Meter
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.engine.weighted_loss import weighted_loss
from hf_accel.host.view import TrainerView
from hf_accel.preserve import buffers_kept, random_state_kept
from hf_accel.stream.indexed import StepStream
from hf_accel.technique import Technique

OWN_LOSS = frozenset({"loss_weights", "extra_loss", "loss_head"})
"""Hooks that need a loss made from the losses of the examples."""

OnePass = Callable[[nn.Module, Mapping[str, Any], Any], Tensor]
"""Trainer's own ``training_step``: forward and backward of one micro-batch."""


class StepRunner:
    """Run the steps of one call of ``train()``.

    Args:
        head: Head, which splits the loss into losses of items; None if it is unknown.
        example_loss: True if the user passed ``example_loss_func``.
        micro_batch_size: Examples of one forward pass.
        halves: True to halve the size when memory runs out (``micro_batch_size="auto"``).
    """

    def __init__(
        self,
        host: TrainerView,
        roster: Roster,
        ranks: Ranks,
        meter: Meter,
        *,
        head: losses.Head | None,
        example_loss: bool,
        micro_batch_size: int,
        halves: bool,
    ):
        self.host, self.roster, self.ranks, self.meter = host, roster, ranks, meter
        self.head, self.example_loss, self.halves = head, example_loss, halves
        self.micro_batch_size = micro_batch_size
        self.stream: StepStream | None = None
        self.loader_counter: sizes.LoaderCounter | None = None
        self.proof = LossProof(host, roster, ranks)
        self.micro_batch: MicroBatch | None = None
        self.grad_norm: Any = None
        self.refused = False
        self.one_pass: OnePass | None = None
        self._own_loss = False
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._states: list[memory.TechniqueState] = []

    # The batch ------------------------------------------------------------------------------------------------------

    def begin_epoch(self, batches: int) -> None:
        """Begin an epoch; an earlier process has read the given number of its batches."""
        self.flush_observations()
        if self.loader_counter is not None:
            self.loader_counter.begin_epoch(batches)

    def plain_batches(self, batches: list[Any]) -> None:
        """Count batches of Trainer's own loader."""
        # If the data has no length, Trainer would ask for as many batches as a budget might have steps.
        self.host.control.should_epoch_stop |= not batches
        samples = sizes.samples_of(batches, self.loader_counter, self.ranks.world_size)
        positions, tokens = sum(map(self.num_positions, batches)), [self._num_tokens(batch) for batch in batches]
        self.meter.refuse_uncounted(samples=samples, tokens=tokens, batches=batches)
        self.meter.begin_step(samples or 0, positions, sum(t for t in tokens if t is not None))

    def next_batch(self, batches: Iterator[StepBatch]) -> tuple[list[StepBatch], Any]:
        """Return the next step batch of the stream and the divisor of its loss."""
        with self.meter.stopwatch.charge("data"):
            batch = next(batches, None)
            if batch is None:
                self.host.control.should_epoch_stop = True  # the stream was empty in a later epoch
                return [], None
            if self.halves or self.roster.owner("step_select") is not None:
                self._states = memory.technique_states(self.roster)
            read_ahead = batch.plan.micro_batch_size != self.micro_batch_size  # before memory ran out
            batch = self.read_again(batch.plan) if read_ahead else self.transformed(batch)
        if self.head is not None and not self.example_loss and not self.proof.head_is_proved:
            if self.roster.answered & hosts.NEEDS_EXAMPLE_LOSSES or self._needs_own_loss(batch):
                batch = self.retry_on_oom(self.host.model_wrapped, batch, self._prove_head)
        if (owner := self.roster.owner("step_select")) is not None and owner.needs_step_losses():
            with self.meter.charge(owner):
                batch = self.retry_on_oom(self.host.model_wrapped, batch, functools.partial(self._selected, owner))
        positions = sum(self.num_positions(micro.inputs) for micro in batch.micro_batches)
        self.meter.begin_step(batch.num_examples, positions, self._tokens_of(batch))
        return [batch], self.count_items(batch)

    def _prove_head(self, batch: StepBatch) -> StepBatch:
        """Compare our loss with the model's own; drop the head if they differ, to use the model's own."""
        assert self.head is not None and self.stream is not None
        if not self.proof.prove_head(self.head, batch, self.stream.read):
            self.head = None
        return batch

    def read_again(self, plan: StepPlan) -> StepBatch:
        """Read a planned step batch again, in micro-batches of the current size."""
        assert self.stream is not None
        plan = dataclasses.replace(plan, micro_batch_size=self.micro_batch_size)
        return self.transformed(self.stream.read(plan))

    def transformed(self, batch: StepBatch) -> StepBatch:
        """Return the step batch as the techniques change it."""
        for technique in self.roster.with_hook("transform_batch"):
            with self.meter.charge(technique):
                batch = technique.transform_batch(batch)
        return batch

    def _selected(self, owner: Technique, batch: StepBatch) -> StepBatch:
        """Return the examples that the owner of ``step_select`` keeps, given the losses of all of them."""
        plan = batch.plan
        by_id = self._losses_by_id(batch)
        kept, kept_weights = owner.step_select(plan.ids_N, torch.tensor([by_id[i] for i in plan.ids_N.tolist()]))
        if len(kept) == 0:
            raise ValueError(f"{owner!r} kept no example of a step. Keep at least one.")
        if len(kept) == len(plan.ids_N) and kept_weights is None:
            return batch
        if plan.weights_N is not None:
            kept_weights = plan.weights_N[kept] * (1.0 if kept_weights is None else kept_weights)
        for technique, scope, state in self._states:
            if technique is not owner:
                technique.load_state_dict(scope, copy.deepcopy(state))  # count a repeated transform once
        return self.read_again(plan.chosen(kept, kept_weights))

    def _losses_by_id(self, batch: StepBatch) -> dict[int, float]:
        """Return the loss of each example of a step, over all ranks."""
        assert self.head is not None
        model: Any = self.host.model_wrapped
        ids_of, values_of = [], []
        model.train()
        with torch.no_grad(), buffers_kept(self.host.model), random_state_kept(self.host.args.device):
            for micro in batch.micro_batches:
                inputs = self.host.prepare_inputs(micro.model_inputs)
                forward = functools.partial(model, **self.head.without_labels(self.host.model, inputs))
                outputs = self.meter.count(self.host.model, inputs, forward, needed=False)
                ids_B, losses_B = self.head.losses(outputs, inputs, len(micro.ids_B)).by_id(micro.ids_B)
                ids_of.append(ids_B)
                values_of.append(losses_B)
        ids, values = self.ranks.gather(torch.cat(ids_of), torch.cat(values_of))
        return dict(zip(ids.tolist(), values.tolist(), strict=True))

    def _tokens_of(self, batch: StepBatch) -> Tensor | int:
        tokens, inputs = [self._num_tokens(m.inputs) for m in batch.real_micro_batches], batch.micro_batches[0].inputs
        self.meter.refuse_uncounted(samples=0, tokens=tokens, batches=[inputs])
        return sum(t for t in tokens if t is not None)

    def _num_tokens(self, inputs: Any) -> Tensor | int | None:
        return sizes.num_tokens(inputs, self._main_input)

    def num_positions(self, inputs: Any) -> int:
        """Return the size of a batch, including padding: positions of text, pixels of images."""
        return sizes.num_positions(inputs, self._main_input)

    @property
    def _main_input(self) -> str:
        return getattr(self.host.model, "main_input_name", "input_ids")

    def count_items(self, batch: StepBatch) -> Tensor | int | None:
        """Return the divisor of the step's loss, over micro-batches and ranks."""
        args = self.host.args
        self._own_loss = self._needs_own_loss(batch)
        if not self._own_loss:
            if self.proof.loss_is_mean:
                return None
            return self.host.get_num_items_in_batch([micro.inputs for micro in batch.micro_batches], args.device)
        assert self.head is not None
        counts = [self.head.count(m.inputs, len(m.ids_B)) for m in batch.real_micro_batches]
        items_K = sum(counts[1:], counts[0]) if counts else torch.zeros(self.head.terms)
        items_K = items_K.to(args.device, torch.float32)
        if args.average_tokens_across_devices and args.world_size > 1:
            items_K = self.host.accelerator.reduce(items_K, "sum")
        return items_K.clamp(min=1)

    def _needs_own_loss(self, batch: StepBatch) -> bool:
        """Return whether the model's own loss is unsuitable: it ignores weights, and some models mis-scale it."""
        if self.head is None:
            return False
        if self.roster.answered & OWN_LOSS or self.example_loss:
            return True
        if batch.plan.has_dummy_micro_batches or any(m.weights_B is not None for m in batch.micro_batches):
            return True
        divided = len(batch.micro_batches) > 1 or self.ranks.world_size > 1
        return (divided or self.roster.owner("collate") is not None) and not self._host_scales_rightly

    @functools.cached_property
    def _host_scales_rightly(self) -> bool:
        """Return whether the model's own loss is correct when divided by Trainer's number of items."""
        if getattr(self.head, "shift", False) != self.host.loss_shifts_labels:
            return False
        if self.host.label_smoother is not None:
            return self.host.model_accepts_loss_kwargs
        return losses.honors_num_items(self.host.model)

    # Memory ---------------------------------------------------------------------------------------------------------

    def set_micro_batch_size(self, size: int) -> None:
        """Set the size of the micro-batches that are read next."""
        self.micro_batch_size = size
        if self.stream is not None:
            self.stream.micro_batch_size = size

    def retry_on_oom(
        self, model: nn.Module, batch: StepBatch, attempt: Callable[[StepBatch], memory.Result]
    ) -> memory.Result:
        """Return ``attempt(batch)``, in micro-batches that fit.

        ``batch`` holds the micro-batches of the last attempt at the end, because Trainer counts its operations.
        """
        if not self.halves:
            return attempt(batch)
        alone = self.ranks.world_size == 1
        before = self.snapshot(model, self._states) if alone else None
        while True:
            try:
                return attempt(batch)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                # Count examples, because a technique may have cut them into pieces.
                rows = min(max(len(micro.ids_B) for micro in batch.micro_batches), self.micro_batch_size)
                if before is None or rows == 1:
                    step, folder = self.host.state.global_step + 1, self.host.args.output_dir
                    raise memory.NotEnoughMemory(memory.advice(rows, self.micro_batch_size, step, folder)) from error
            # The handler would keep the failed attempt's activations alive, so restore outside of it.
            before.restore()
            self.set_micro_batch_size(memory.smaller(self.micro_batch_size, rows))
            batch.micro_batches[:] = self.read_again(batch.plan).micro_batches

    def snapshot(self, model: nn.Module, states: list[memory.TechniqueState]) -> memory.StepSnapshot:
        """Copy everything that a failed attempt at a step may change."""
        return memory.StepSnapshot(model, self.host.args.device, states, self._observed)

    def fits(self, size: int, longest: int) -> bool:
        """Return whether a micro-batch of ``size`` copies of the example at ``longest`` fits on this rank."""
        assert self.stream is not None
        plan = StepPlan(0, torch.full((size,), longest), None, size, seed=self.stream.seed)
        batch = self.stream.read(plan)
        # Bypass DDP, which would wait for the other ranks; a sharded model is sharded in place.
        model = self.host.model
        before = self.snapshot(model, memory.technique_states(self.roster))
        items = self.count_items(batch)  # needs all ranks, so before memory may run out on one
        attempt = functools.partial(self.accumulate_once, model, batch, items)
        return memory.fits(model, self.host.optimizer, before, attempt)

    # The gradient ---------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, inputs: Any, num_items: Any, one_pass: OnePass) -> Tensor:
        """Compute the gradient of a step and return its loss; take a step batch or a batch of Trainer's loader."""
        self.one_pass = one_pass
        if not isinstance(inputs, StepBatch):
            with self.meter.stopwatch.charge("backward"):  # except the forward pass, which `loss` charges
                step = functools.partial(self.one_pass, model, inputs, num_items)
                return self.meter.count(self.host.model, inputs, step)
        backward = functools.partial(self.accumulate, model, inputs, num_items)
        if (owner := self.roster.owner("objective")) is None:
            return backward()
        with self.meter.charge(owner):
            return owner.objective(model, backward)

    def accumulate(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        """Run forward and backward over a step's micro-batches, in smaller ones if memory runs out."""

        def attempt(batch: StepBatch) -> Tensor:
            items = num_items
            if self.micro_batch_size != batch.plan.micro_batch_size:  # ``num_items`` is for the old size
                self.meter.repeat_step(self._tokens_of(batch))
                items = self.count_items(batch)
            once = functools.partial(self.accumulate_once, model, batch)
            if self._own_loss or not self.proof.must_watch(batch, items):
                return once(items)
            return self.proof.watch(once, items, self.snapshot(model, []))

        return self.retry_on_oom(model, batch, attempt)

    def accumulate_once(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        """Run forward and backward over the micro-batches of a step."""
        host = self.host
        # Our own loss is already divided by the items of the whole step.
        parts = [(micro, 1.0 if self._own_loss else float(len(batch.micro_batches))) for micro in batch.micro_batches]
        if mean := not self._own_loss and self.proof.is_mean(num_items):
            parts = self.proof.parts_of_mean(batch, self.stream)
        synchronizes = (owner := self.roster.owner("synchronize")) is None or owner.synchronize()
        total = torch.zeros((), device=host.args.device)
        for i, (micro, divisor) in enumerate(parts, 1):
            last = i == len(parts)
            host.current_gradient_accumulation_steps = divisor
            with self.proof.means() if mean else contextlib.nullcontext():
                loss = self._pass_over(model, micro, num_items, last=last, synchronizes=synchronizes)
            total = total + loss if divisor < torch.inf else total
            if not last:
                host.control = host.callback_handler.on_substep_end(host.args, host.state, host.control)
        return total

    def _pass_over(self, model: nn.Module, micro: MicroBatch, num_items: Any, *, last: bool, synchronizes: bool):
        """Run forward and backward of one micro-batch; ranks exchange gradients in the last one."""
        assert self.one_pass is not None
        accelerator = self.host.accelerator
        accelerator.sync_gradients = last
        always = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        exchanges = deepspeed or (synchronizes and (last or always))
        self.micro_batch = micro
        try:
            with contextlib.nullcontext() if exchanges else accelerator.no_sync(model):
                inputs = micro.inputs  # a trainer may count tokens by the mask
                step = functools.partial(self.one_pass, model, inputs, num_items)
                with self.meter.stopwatch.charge("backward"):
                    return self.meter.count(self.host.model, inputs, step)
        finally:
            self.micro_batch = None

    def judge(self, model: nn.Module, norm: Any) -> Any:
        """Ask techniques to accept the update, given the gradient norm before clipping; return the norm."""
        self.grad_norm, self.refused = norm, False
        for technique in self.roster.with_hook("accept_step"):
            with self.meter.charge(technique):
                self.refused |= not technique.accept_step(norm)
        if self.refused:
            # Optimizers skip parameters without a gradient, so neither moments nor weights change.
            model.zero_grad(set_to_none=True)
        return norm

    # The loss -------------------------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool, num_items: Any, plain: Callable[..., Any]
    ) -> Any:
        """Return the loss of a micro-batch; ``plain`` is Trainer's own ``compute_loss``."""
        micro = self.micro_batch
        if not model.training:
            return plain(model, inputs, return_outputs, num_items)
        with self.meter.stopwatch.charge("forward"):
            if micro is None:
                return plain(model, inputs, return_outputs, num_items)
            observed = "observe" in self.roster.answered
            if self._own_loss:
                assert self.head is not None
                given = self.host, self.roster, self.meter, self.head
                loss, outputs, example = weighted_loss(*given, model, micro.for_model(inputs), micro, num_items)
            elif observed:
                assert self.head is not None
                kept = dict(micro.for_model(inputs))
                loss, outputs = plain(model, inputs, True, num_items)
                with torch.no_grad():
                    example = self.head.losses(outputs, kept, len(micro.ids_B))
            else:
                return plain(model, inputs, return_outputs, num_items)
            if observed:
                self._observed.append(example.by_id(micro.ids_B))
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def unobserved(self) -> Iterator[None]:
        """Forget the losses that are computed inside."""
        number = len(self._observed)
        try:
            yield
        finally:
            del self._observed[number:]

    def flush_observations(self) -> None:
        """Give techniques the losses of the examples trained on, over all ranks."""
        if not self._observed:
            return
        columns = zip(*self._observed, strict=True)
        ids, values = self.ranks.gather(*(torch.cat(column) for column in columns))
        self._observed.clear()
        for technique in self.roster.with_hook("observe"):
            with self.meter.charge(technique):
                technique.observe(ids, values)
