"""One step: a step batch is drawn, transformed and counted, and its gradient accumulated over micro-batches.

The loss is the model's own wherever that is right; else it is made from the losses of the examples, weighted as the
techniques say and divided by what the whole step counts over micro-batches and ranks.

Shape suffixes: ``B`` examples, ``L`` items of an example, ``K`` terms of the loss.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from transformers import Trainer

from hf_accel import losses
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.engine import memory
from hf_accel.engine.hosting import Hosting
from hf_accel.preserve import buffers_kept, random_state_kept
from hf_accel.technique import Technique

Result = TypeVar("Result")


class Stepping(Hosting):
    """Answers Trainer where it asks for batches, losses and gradients."""

    # The batch ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.clock.step_begins()
        with self.stopwatch.charge("data"):
            if self.stream is None:
                batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
                # Where the data has no length, Trainer would ask as often as a budget might have steps.
                self.control.should_epoch_stop |= not batches
                self._trained_samples = sum(map(_num_rows, batches)) * self.args.world_size
                self._trained_positions = sum(map(self._num_positions, batches))
                self._begin_counting_tokens(batches)
                return batches, items
            batch = next(epoch_iterator, None)
            if batch is None:
                self.control.should_epoch_stop = True  # a stream that gave nothing in a later epoch
                return [], None
            if self.requested_micro_batch_size == "auto" or self._owners["step_select"] is not None:
                self.step_states = memory.technique_states(self)
            read_ahead = batch.plan.micro_batch_size != self.micro_batch_size  # before memory ran out
            batch = self.read_again(batch.plan) if read_ahead else self._transformed(batch)
        if (owner := self._owners["step_select"]) is not None and owner.needs_step_losses():
            with self.charge(owner):
                selected = functools.partial(self._selected, owner)
                batch = memory.retry_on_oom(self, self.model_wrapped, batch, selected)
        self._trained_samples = batch.num_examples
        self._trained_positions = sum(self._num_positions(micro.inputs) for micro in batch.micro_batches)
        self._begin_counting_tokens([micro.inputs for micro in batch.real_micro_batches])
        return [batch], self._count_items(batch)

    def read_again(self, plan: StepPlan) -> StepBatch:
        """A step batch by its plan, in micro-batches of the present size."""
        assert self.stream is not None
        plan = dataclasses.replace(plan, micro_batch_size=self.micro_batch_size)
        return self._transformed(self.stream.read(plan))

    def _begin_counting_tokens(self, batches) -> None:
        """The tokens of a new step; those of a step that is done again are counted once."""
        self._tokens_before = self._tokens_before + self._tokens_of_step
        self._tokens_of_step = sum(map(self._num_tokens, batches))

    def set_micro_batch_size(self, size: int) -> None:
        """From now on, read micro-batches of this size."""
        self.micro_batch_size = size
        if self.stream is not None:
            self.stream.micro_batch_size = size

    def fit_memory(self) -> None:
        """Where several ranks must agree, find the micro-batch that fits before the first step."""
        if self.requested_micro_batch_size == "auto" and self.args.world_size > 1 and self._resumed is None:
            self.set_micro_batch_size(memory.agree_micro_batch_size(self))

    def _transformed(self, batch: StepBatch) -> StepBatch:
        for technique in self.with_hook("transform_batch"):
            with self.charge(technique):
                batch = technique.transform_batch(batch)
        return batch

    def _selected(self, owner: Technique, batch: StepBatch) -> StepBatch:
        """The examples of a drawn step that its owner keeps, judged by the losses of all of them."""
        assert self.head is not None and self.stream is not None
        model: Any = self.model_wrapped
        ids_of, values_of = [], []
        model.train()
        with torch.no_grad(), buffers_kept(self.model), random_state_kept(self.args.device):
            for micro in batch.micro_batches:
                inputs = self._prepare_inputs(_model_inputs(micro))
                forward = functools.partial(model, **self.head.without_labels(self.model, inputs))
                outputs = self.count(inputs, forward, needed=False)
                ids_B, losses_B = _of_examples(self.head.losses(outputs, inputs, len(micro.ids_B)), micro.ids_B)
                ids_of.append(ids_B)
                values_of.append(losses_B)
        ids, values = self.gather(torch.cat(ids_of), torch.cat(values_of))
        by_id = dict(zip(ids.tolist(), values.tolist(), strict=True))
        plan = batch.plan
        kept, kept_weights = owner.step_select(plan.ids_N, torch.tensor([by_id[i] for i in plan.ids_N.tolist()]))
        if len(kept) == 0:
            raise ValueError(f"{owner!r}: it kept no example of a step. Keep more.")
        if len(kept) == len(plan.ids_N) and kept_weights is None:
            return batch
        if plan.weights_N is not None:
            kept_weights = plan.weights_N[kept] * (1.0 if kept_weights is None else kept_weights)
        for technique, scope, state in self.step_states:
            if technique is not owner:
                technique.load_state_dict(scope, copy.deepcopy(state))  # what is transformed again is counted once
        return self.read_again(plan.chosen(kept, kept_weights))

    def _num_tokens(self, inputs) -> Tensor | int:
        if "attention_mask" in inputs and inputs["attention_mask"].dim() == 2:
            return inputs["attention_mask"].sum()
        values = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if values is None or values.is_floating_point() else values.numel()

    def _num_positions(self, inputs) -> int:
        """The size of a batch, padding included: positions of text, pixels of images."""
        values = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if values is None else values.numel()

    def _count_items(self, batch: StepBatch) -> Tensor | int | None:
        """What the step's loss is divided by, over micro-batches and ranks."""
        self._own_loss = self._needs_own_loss(batch)
        if not self._own_loss:
            return self._get_num_items_in_batch([micro.inputs for micro in batch.micro_batches], self.args.device)
        assert self.head is not None
        counts = [self.head.count(m.inputs, len(m.ids_B)) for m in batch.real_micro_batches]
        items_K = sum(counts[1:], counts[0]) if counts else torch.zeros(self.head.terms)
        items_K = items_K.to(self.args.device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items_K = self.accelerator.reduce(items_K, "sum")
        return items_K.clamp(min=1)

    def _needs_own_loss(self, batch: StepBatch) -> bool:
        """Whether the model's own loss would not do: it knows no weights, and some models mis-scale it."""
        if self.head is None:
            return False
        asked = self._answered & {"example_weights", "token_weights", "extra_loss", "loss_head"}
        if asked or self.example_loss_func is not None:
            return True
        if batch.plan.has_dummy_micro_batches or any(m.weights_B is not None for m in batch.micro_batches):
            return True
        divided = len(batch.micro_batches) > 1 or self.args.world_size > 1
        return (divided or self._owners["collate"] is not None) and not self._host_scales_rightly

    @functools.cached_property
    def _host_scales_rightly(self) -> bool:
        """Whether the model's own loss is right when it is divided by the number of items that Trainer counts."""
        if getattr(self.head, "shift", False) != self._loss_shifts_labels:
            return False
        if self.label_smoother is not None:
            return self.model_accepts_loss_kwargs
        return losses.honors_num_items(self.model)

    # The gradient ---------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not isinstance(inputs, StepBatch):
            step = functools.partial(super().training_step, model, inputs, num_items_in_batch)
            with self.stopwatch.charge("backward"):  # what is not forward
                return self.count(inputs, step)
        backward = functools.partial(self._accumulate, model, inputs, num_items_in_batch)
        if (owner := self._owners["objective"]) is None:
            return backward()
        with self.charge(owner):
            return owner.objective(model, backward)

    def _accumulate(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        """Forward and backward over the micro-batches of a step, in smaller ones where memory does not suffice."""

        def attempt(batch: StepBatch) -> Tensor:
            if self.micro_batch_size == batch.plan.micro_batch_size:  # for which ``num_items`` was counted
                return self._accumulate_once(model, batch, num_items)
            self._tokens_of_step = sum(self._num_tokens(micro.inputs) for micro in batch.real_micro_batches)
            return self._accumulate_once(model, batch, self._count_items(batch))

        return memory.retry_on_oom(self, model, batch, attempt)

    def _accumulate_once(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        owner = self._owners["synchronize"]
        synchronized = owner is None or owner.synchronize()
        micros = batch.micro_batches
        # Our own loss is divided by what the whole step counts; there is nothing left to divide by.
        self.current_gradient_accumulation_steps = 1 if self._own_loss else len(micros)
        total = torch.zeros((), device=self.args.device)
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            always = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            sync = deepspeed or (synchronized and (last or always))
            self.micro_batch = micro
            try:
                with contextlib.nullcontext() if sync else self.accelerator.no_sync(model):
                    inputs = _model_inputs(micro)
                    step = functools.partial(super().training_step, model, inputs, num_items)
                    with self.stopwatch.charge("backward"):
                        total = total + self.count(inputs, step)
            finally:
                self.micro_batch = None
            if not last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return total

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """What ``run``, which computes the model over inputs, returns; operations are counted where they are limited.

        Args:
            needed: Whether the model needs them for its gradient.
        """
        if (meter := self.meters.get("flops")) is None:
            return run()
        varied = (needed, *(technique.flops_key() for technique in self.techniques))
        result, flops = meter.measure(self.model, inputs, run, varied)
        executed, model = self._flops_of_step
        self._flops_of_step = (executed + flops.executed, model + flops.model * needed)
        return result

    def _prepare_inputs(self, inputs):
        moved: Any = send_to_device(inputs, self.args.device, non_blocking=True)
        return super()._prepare_inputs(moved)

    def _get_grad_norm(self, model, grad_norm=None):
        norm: Any = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = norm  # before clipping
        self._step_refused = False
        for technique in self.with_hook("accept_step"):
            with self.charge(technique):
                self._step_refused |= not technique.accept_step(norm)
        if self._step_refused:
            # Optimizers pass over parameters without a gradient: neither moments nor weight decay move.
            model.zero_grad(set_to_none=True)
            self._skipped_steps += 1
        return norm

    def count_step(self) -> None:
        """Tell the clock what the step spent; before the learning rate of the next one is set."""
        tokens = self._count_tokens() if "tokens" in self.clock.limits else 0.0
        flops, model_flops, joules = self._measured() if self.meters else (0.0, 0.0, 0.0)
        epochs = (self.state.global_step + 1) / self.steps_per_epoch if self.stream is None else self.stream.epochs
        self.clock.model_flops += model_flops
        self.clock.advance(
            steps=0 if self._step_refused else 1,
            samples=self._trained_samples,
            tokens=tokens,
            flops=flops,
            joules=joules,
            epochs=epochs,
        )

    def count_energy(self) -> None:
        """Tell the clock the energy since the last step."""
        if "joules" in self.meters:
            self.clock.spent["joules"] += self._measured()[2]

    def first_step_cost(self) -> dict[str, float]:
        """What the first step has taken until its update, of the units that are known only afterwards."""
        joules = self.meters["joules"]() - self._joules_read if "joules" in self.meters else 0.0
        local = [float(self._tokens_before + self._tokens_of_step), self._flops_of_step[0], joules]
        tokens, flops, joules = self._summed(local)
        earlier = self.clock.spent["joules"]  # before the first step
        return {"tokens": tokens, "flops": flops, "joules": earlier + joules, "seconds": self.clock.seconds}

    def _count_tokens(self) -> float:
        """Tokens since the last call, over all ranks."""
        tokens = float(self._tokens_before + self._tokens_of_step)
        self._tokens_before = self._tokens_of_step = 0
        return self._summed([tokens])[0]

    def _measured(self) -> list[float]:
        """Operations, those of them that the model needs, and joules since the last call, over all ranks."""
        joules = self.meters["joules"]() if "joules" in self.meters else 0.0
        local = [*self._flops_of_step, joules - self._joules_read]
        self._flops_of_step, self._joules_read = (0.0, 0.0), joules
        return self._summed(local)

    def _summed(self, values: list[float]) -> list[float]:
        """The sums over all ranks."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums, group=self._cpu_group)
        return sums.tolist()

    # The loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Any = None):
        micro = self.micro_batch
        if micro is None or not model.training:
            charge = self.stopwatch.charge("forward") if model.training else contextlib.nullcontext()
            with charge:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.stopwatch.charge("forward"):
            observed = "observe" in self._answered
            if self._own_loss:
                loss, outputs, example = self._weighted_loss(model, inputs, micro, num_items_in_batch)
            elif observed:
                kept = dict(inputs)
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                with torch.no_grad():
                    example = self.head.losses(outputs, kept, len(micro.ids_B))
            else:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if observed:
                self._observed.append(_of_examples(example, micro.ids_B))
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(self, model, inputs, micro: MicroBatch, items_K: Tensor):
        """The loss of a micro-batch from the losses of its examples, divided by what the whole step counts."""
        head, num_examples = self.head, len(micro.ids_B)
        outputs = model(**head.without_labels(self.model, inputs))
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        example = head.losses(outputs, inputs, num_examples, label_smoothing=smoothing)
        device = example.losses_BL.device
        weight_B = None if micro.weights_B is None else micro.weights_B.to(device)
        weight_BL = None
        for technique in self.with_hook("example_weights"):
            with self.charge(technique):
                weight_B = _product(weight_B, technique.example_weights(example, micro.ids_B))
        for technique in self.with_hook("token_weights"):
            with self.charge(technique):
                weight_BL = _product(weight_BL, technique.token_weights(example, micro.ids_B))
        loss = losses.weighted_mean(example, items_K, weight_B, weight_BL)
        for technique in self.with_hook("extra_loss"):
            with self.charge(technique):
                if (extra := technique.extra_loss(model, inputs, outputs)) is not None:
                    loss = loss + extra / items_K.sum()
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks
        return loss, outputs, example

    def _flush_observations(self) -> None:
        """Tell the techniques the losses of what was trained on, over all ranks."""
        if not self._observed:
            return
        ids, values = self.gather(*(torch.cat(column) for column in zip(*self._observed, strict=True)))
        self._observed.clear()
        for technique in self.with_hook("observe"):
            with self.charge(technique):
                technique.observe(ids, values)

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and values of all ranks, on the CPU, without fillers."""
        if self.args.world_size > 1:
            ids_B, values_B = ids_B.to(self.args.device), values_B.to(self.args.device)
            ids_B = self.accelerator.gather(self.accelerator.pad_across_processes(ids_B, pad_index=-1))
            values_B = self.accelerator.gather(self.accelerator.pad_across_processes(values_B))
        ids_B, values_B = ids_B.cpu(), values_B.detach().cpu()
        return ids_B[ids_B >= 0], values_B[ids_B >= 0]

    @contextlib.contextmanager
    def unobserved(self) -> Iterator[None]:
        """Forget the losses that are computed inside."""
        number = len(self._observed)
        try:
            yield
        finally:
            del self._observed[number:]

    def prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs on the device, as the model is given them."""
        return self._prepare_inputs(inputs)

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""
        self.current_flos += flops

    def floating_point_ops(self, inputs):
        if isinstance(inputs, StepBatch):
            return sum(self.floating_point_ops(micro.inputs) for micro in inputs.micro_batches)
        if super().floating_point_ops.__func__ is not Trainer.floating_point_ops:
            return super().floating_point_ops(inputs)
        # Trainer counts all parameters in every step. A model that gets others gives them to the optimizer.
        size = self._num_positions(inputs), sum(len(group["params"]) for group in self.optimizer.param_groups)
        if size not in self._flops_by_size:
            self._flops_by_size[size] = super().floating_point_ops(inputs)
        return self._flops_by_size[size]

    def _track_num_input_tokens(self, inputs):
        if not isinstance(inputs, StepBatch):
            return super()._track_num_input_tokens(inputs)
        for micro in inputs.micro_batches:
            super()._track_num_input_tokens(micro.inputs)


def _product(weight: Tensor | None, factor: Tensor | None) -> Tensor | None:
    if weight is None or factor is None:
        return weight if factor is None else factor
    return weight * factor


def _model_inputs(micro: MicroBatch) -> dict[str, Tensor]:
    """Packed rows go without ``attention_mask``: given one, models do not look where ``position_ids`` begin anew."""
    mask = micro.inputs.get("attention_mask")
    if mask is None or len(mask) >= len(micro.ids_B):
        return micro.inputs
    return {name: value for name, value in micro.inputs.items() if name != "attention_mask"}


def _of_examples(found: losses.ExampleLosses, ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of examples, each once, and their mean losses; an example may be cut into several rows."""
    own_ids, own_B = ids_B.unique(return_inverse=True)
    if len(own_ids) == len(ids_B):
        return ids_B, found.per_example(len(ids_B))
    example_BL = own_B.to(found.example_BL.device)[found.example_BL]
    return own_ids, found._replace(example_BL=example_BL).per_example(len(own_ids))


def _num_rows(inputs) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
