"""The trainer only asks: a mixin over `transformers.Trainer` that hosts techniques.

The body of training stays Trainer's.  The mixin answers Trainer's own questions (which batches, which loss, which
learning rate, what is saved) by asking the techniques, and keeps the clock.  No line here knows a technique by name.

Without a technique nothing is changed.  With one that touches data or losses, batches come from the `StepStream`: one
step of Trainer is one `StepBatch`, whose micro-batches are looped over here (`training_step`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import has_length, rotate_checkpoints
from transformers.utils import logging

from hf_accel import checkpoint as ckpt
from hf_accel import host, losses, memory, weights
from hf_accel.clock import Clock
from hf_accel.pace import Pacer, Restorer
from hf_accel.receipt import Receipt, Stopwatch, peak_memory_bytes
from hf_accel.recipe import Recipe
from hf_accel.stream import MicroBatch, Slots, StepBatch, StepPlan, StepStream
from hf_accel.technique import SLOTS, STREAM, Technique

logger = logging.get_logger(__name__)


class AccelTrainerMixin:
    """Hosts techniques on any Trainer; comes first among the bases of a class.

    Args:
        techniques: Asked in this order.
        recipe: A `Recipe` or the path of one; its techniques come first, its arguments fill in what is not given.
        micro_batch_size: Examples of one forward pass on one device.  None: ``per_device_train_batch_size``; ``"auto"``:
            the largest that fits, found by halving.  The examples of an update stay
            ``per_device_train_batch_size x gradient_accumulation_steps x ranks``.
        allow_changes: Resume although the checkpoint was written with other techniques.
        example_loss_func: ``(outputs, inputs) -> losses_B`` for models whose loss is none of the common heads'.
    """

    clock: Clock
    receipt: Receipt | None

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        techniques: Sequence[Technique] = (),
        recipe: Recipe | str | Path | None = None,
        micro_batch_size: int | Literal["auto"] | None = None,
        allow_changes: bool = False,
        example_loss_func: Callable | None = None,
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        host.check_signatures()
        given = list(callbacks or ())
        techniques = [*techniques, *(callback for callback in given if isinstance(callback, Technique))]
        self.recipe = Recipe()
        if recipe is not None:
            self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
            args = self.recipe.merge_args(args)
            techniques = [*self.recipe.build_techniques(), *techniques]
        self._host(techniques, micro_batch_size, allow_changes, example_loss_func)
        args = self._prepared_args(args or TrainingArguments("tmp_trainer"), kwargs.get("train_dataset"))
        others = [callback for callback in given if not isinstance(callback, Technique)]
        super().__init__(model, args, *positional, callbacks=[*others, *self.techniques], **kwargs)
        self._settle()

    # Construction ---------------------------------------------------------------------------------------------------

    def _host(self, techniques, micro_batch_size, allow_changes, example_loss_func) -> None:
        """Take the techniques in, and find out who answers what."""
        self.techniques: list[Technique] = list(techniques)
        self.allow_changes = allow_changes
        self.example_loss_func = example_loss_func
        self.requested_micro_batch_size = micro_batch_size
        for technique in self.techniques:
            technique.host_ = self
        names = {id(t): f"{i}.{type(t).__name__}" for i, t in enumerate(self.techniques)}
        self.technique_names = [names[id(t)] for t in self.techniques]
        self._owners = {slot: self._find_owner(slot) for slot in SLOTS}
        answered = frozenset().union(*(t.answers() for t in self.techniques)) if self.techniques else frozenset()
        self._answered = answered
        self.streamed = bool(answered & STREAM) or micro_batch_size is not None
        self.paced = self.streamed or self._owners["budget"] is not None or self._owners["schedule"] is not None
        self.clock = Clock({})
        self.receipt = None
        self.stopwatch = Stopwatch()
        self._resumed: dict[str, Any] | None = None
        self._micro: MicroBatch | None = None
        self._swapped = False

    def _find_owner(self, slot: str) -> Technique | None:
        owners = [t for t in self.techniques if slot in t.answers()]
        if len(owners) > 1:
            raise ValueError(f"techniques: {' and '.join(map(repr, owners))} both own the slot {slot!r}. Keep one.")
        return owners[0] if owners else None

    def _prepared_args(self, args: TrainingArguments, dataset: Any) -> TrainingArguments:
        """The arguments that Trainer sees: those that were given, as techniques and the stream want them."""
        self._said = host.changed_arguments(args)
        args = copy.copy(args)
        for technique in self._asked("prepare_args"):
            args = technique.prepare_args(args)
        if self._owners["budget"] is not None:
            host.refuse_two_budgets(args, self._owners["budget"])
            if dataset is not None and not has_length(dataset):
                args.max_steps = sys.maxsize  # Trainer asks for a number where the data has no length
        if self.paced:
            host.refuse_schedules(args, self._owners["schedule"])
        self.accumulation_steps = args.gradient_accumulation_steps
        if self.streamed:
            host.refuse_stream_arguments(args)
            if args.auto_find_batch_size and self.requested_micro_batch_size is None:
                self.requested_micro_batch_size = "auto"
            args.auto_find_batch_size = False
            args.gradient_accumulation_steps = 1
        return args

    def _settle(self) -> None:
        """What can only be said once Trainer is built: the model, the loss, the size of a step."""
        self._replace_model()
        self.callback_handler.callbacks.insert(0, Pacer(self))
        self.callback_handler.callbacks.append(Restorer(self))
        self.callback_handler.__class__ = _charging(type(self.callback_handler))
        self.callback_handler.charge = self.stopwatch.charge
        self.head = self._find_head() if self.streamed else None
        if self.streamed:
            host.refuse_stream_hosts(self)
        self.nominal_batch_size = self._train_batch_size * self.accumulation_steps * self.args.world_size
        self.micro_batch_size = memory.first_micro_batch_size(self)

    def _replace_model(self) -> None:
        if self.model_init is not None or "prepare_model" not in self._answered:
            return  # `call_model_init` asks
        model = self._prepared_model(self.model)
        if model is not self.model:
            self.model = self.model_wrapped = model
            self.callback_handler.model = model
            self._signature_columns = None
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)

    def _prepared_model(self, model: nn.Module) -> nn.Module:
        for technique in self._asked("prepare_model"):
            model = technique.prepare_model(model)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._prepared_model(super().call_model_init(trial))

    def _find_head(self) -> losses.Head | None:
        """The kind of loss; needed where a technique asks for the loss of an example."""
        needing = [t for t in self.techniques if t.answers() & host.NEEDS_EXAMPLE_LOSSES]
        try:
            if self.example_loss_func is not None:
                return losses.head_from(self.example_loss_func)
            if self.compute_loss_func is not None:
                raise ValueError("compute_loss_func gives one loss for all examples. Give example_loss_func= as well.")
            host.refuse_own_losses(self)
            return losses.head_of(self.model)
        except ValueError as error:
            if needing:
                raise ValueError(f"{', '.join(map(repr, needing))} needs a loss for each example: {error}") from None
            return None

    def _asked(self, hook: str) -> list[Technique]:
        return [t for t in self.techniques if hook in t.answers()]

    def _charge(self, technique: Technique) -> contextlib.AbstractContextManager:
        return self.stopwatch.charge(self.technique_names[self.techniques.index(technique)])

    # The run --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        self.stopwatch.seconds.clear()
        self._skipped_steps = 0
        self._trained_samples = 0.0
        self._uncounted: list[Tensor | int] = []
        self._observed: list[tuple[Tensor, Tensor]] = []
        self.stream: StepStream | None = None
        self.run_id = uuid.uuid4().hex
        self.clock = Clock(self._limits(), now=self.clock.now, share=self._share)
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._resumed = None if checkpoint is None else self._read_checkpoint(checkpoint)
        self.clock.start()
        with self.stopwatch.charge("other"):
            output = super().train(checkpoint, *args, **kwargs)
        self._write_receipt()
        return output

    def _limits(self) -> dict[str, float]:
        if self._owners["budget"] is not None:
            return dict(self._owners["budget"].budget())
        if self.args.max_steps > 0:
            return {"steps": float(self.args.max_steps)}
        return {"epochs": float(self.args.num_train_epochs)}

    def _share(self, values: list[float]) -> list[float]:
        """The values of rank 0, on every rank."""
        if self.args.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0, group=self._cpu_group)
        return shared.tolist()

    @functools.cached_property
    def _cpu_group(self):
        """A group whose messages do not wait for the accelerator."""
        return torch.distributed.new_group(backend="gloo")

    # Data -----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        given = self.train_dataset
        try:
            for technique in self._asked("prepare_dataset"):
                with self._charge(technique):
                    self.train_dataset = technique.prepare_dataset(self.train_dataset)
            if not self.streamed or given is None:
                return super().get_train_dataloader()
            self.stream = self._make_stream(self.train_dataset)
        finally:
            self.train_dataset = given
        if self._resumed is not None and "stream" in self._resumed:
            self.stream.load_state_dict(self._resumed["stream"])
        return self.stream

    def _make_stream(self, dataset: Any) -> StepStream:
        args, collator = self.args, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return StepStream(
            dataset,
            collator,
            batch_size=self.nominal_batch_size,
            micro_batch_size=self.micro_batch_size,
            # accelerate seeds Trainer's own order like this.
            seed=args.data_seed if args.data_seed is not None else torch.random.initial_seed(),
            rank=args.process_index,
            world=args.world_size,
            sequential=args.train_sampling_strategy == "sequential",
            drop_last=args.dataloader_drop_last,
            slots=Slots(**{slot: self._owners[slot] for slot in ("select", "order", "batch", "collate")}),
            loader={
                "num_workers": args.dataloader_num_workers,
                "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
                "persistent_workers": args.dataloader_persistent_workers,
                "prefetch_factor": args.dataloader_prefetch_factor,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            },
        )

    def set_initial_training_values(self, args, dataloader):
        values = list(super().set_initial_training_values(args, dataloader))
        self.steps_per_epoch = values[1]
        if self.paced:
            limits = self.clock.limits
            values[0] = math.ceil(limits["epochs"]) if "epochs" in limits else sys.maxsize
            self.nominal_steps = host.nominal_steps(limits, self.steps_per_epoch, self.nominal_batch_size)
            host.refuse_absolute_warmup(args, self.nominal_steps, limits, self._owners["schedule"])
            values[6] = self.nominal_steps or self.steps_per_epoch
        return tuple(values)

    def get_total_train_batch_size(self, args) -> int:
        return self.nominal_batch_size if self.streamed else super().get_total_train_batch_size(args)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        if self.paced:
            for kind in ("logging", "eval", "save"):
                if 0 < (getattr(self.args, f"{kind}_steps") or 0) < 1:
                    setattr(self.state, f"{kind}_steps", sys.maxsize)  # the pacer fires at fractions of progress
        if self.stream is None or resume is None:
            return position
        if not (self._resumed and "stream" in self._resumed):
            return position  # a plain Trainer's checkpoint: only its whole epochs are known
        return self.stream.epoch + int(self.stream.epoch_is_over), 0

    def _run_epoch(self, **kwargs):
        if self.stream is not None:
            self._flush_observations()
            # The stream ends its epochs itself (see `Pacer`): how many steps they have is not known beforehand.
            kwargs.update(steps_in_epoch=sys.maxsize, num_update_steps_per_epoch=sys.maxsize)
        return super()._run_epoch(**kwargs)

    # One step -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.clock.step_begins()
        with self.stopwatch.charge("data"):
            if self.stream is None:
                batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
                self._trained_samples = sum(map(_num_rows, batches)) * self.args.world_size
                self._uncounted.extend(self._num_tokens(batch) for batch in batches)
                return batches, items
            batch = next(epoch_iterator, None)
            if batch is None:
                return [], None
            if batch.plan.micro_batch_size != self.micro_batch_size:  # read ahead, before memory ran out
                batch = self.stream.read(dataclasses.replace(batch.plan, micro_batch_size=self.micro_batch_size))
            batch = self._transformed(batch)
        if (owner := self._owners["step_select"]) is not None:
            with self._charge(owner):
                batch = self._selected(owner, batch)
        self._trained_samples = batch.num_examples
        self._uncounted.extend(self._num_tokens(micro.inputs) for micro in batch.micro_batches)
        return [batch], self._count_items(batch)

    def read_again(self, plan: StepPlan) -> StepBatch:
        """A step batch by its plan, in micro-batches of the present size."""
        assert self.stream is not None
        plan = dataclasses.replace(plan, micro_batch_size=self.micro_batch_size)
        return self._transformed(self.stream.read(plan))

    def set_micro_batch_size(self, size: int) -> None:
        """From now on, read micro-batches of this size."""
        self.micro_batch_size = size
        if self.stream is not None:
            self.stream.micro_batch_size = size

    def fit_memory(self) -> None:
        """Where several ranks must agree, find the micro-batch that fits before the first step."""
        if self.requested_micro_batch_size == "auto" and self.args.world_size > 1 and self._resumed is None:
            self.set_micro_batch_size(memory.agree(self))

    def _transformed(self, batch: StepBatch) -> StepBatch:
        for technique in self._asked("transform_batch"):
            with self._charge(technique):
                batch = technique.transform_batch(batch)
        return batch

    def _selected(self, owner: Technique, batch: StepBatch) -> StepBatch:
        """The examples of a drawn step that its owner keeps, judged by the losses of all of them."""
        assert self.head is not None and self.stream is not None
        model, per_example = self.model_wrapped, []
        model.train()
        with torch.no_grad(), memory.random_state_kept(self.args.device):
            for micro in batch.micro_batches:
                inputs = self._prepare_inputs(micro.inputs)
                outputs = model(**self.head.without_labels(self.model, inputs))
                per_example.append(self.head.losses(outputs, inputs, len(micro.ids_B)).per_example(len(micro.ids_B)))
        ids, values = self._gathered(torch.cat([m.ids_B for m in batch.micro_batches]), torch.cat(per_example))
        by_id = dict(zip(ids.tolist(), values.tolist(), strict=True))
        plan = batch.plan
        kept, kept_weights = owner.step_select(plan.ids_N, torch.tensor([by_id[i] for i in plan.ids_N.tolist()]))
        if len(kept) == 0:
            raise ValueError(f"{owner!r}: it kept no example of a step. Keep more.")
        if plan.weights_N is not None:
            kept_weights = plan.weights_N[kept] * (1.0 if kept_weights is None else kept_weights)
        plan = dataclasses.replace(plan, ids_N=plan.ids_N[kept], weights_N=kept_weights)
        return self.read_again(plan)

    def _num_tokens(self, inputs) -> Tensor | int:
        if "attention_mask" in inputs and inputs["attention_mask"].dim() == 2:
            return inputs["attention_mask"].sum()
        values = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if values is None or values.is_floating_point() else values.numel()

    def _count_items(self, batch: StepBatch) -> Tensor | int | None:
        """What the step's loss is divided by, over micro-batches and ranks."""
        self._own_loss = self._needs_own_loss(batch)
        if not self._own_loss:
            return self._get_num_items_in_batch([micro.inputs for micro in batch.micro_batches], self.args.device)
        assert self.head is not None
        counts = [self.head.count(m.inputs, len(m.ids_B)) for m in batch.micro_batches if m.ids_B[0] >= 0]
        items_K = sum(counts[1:], counts[0]) if counts else torch.zeros(self.head.terms)
        items_K = items_K.to(self.args.device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items_K = self.accelerator.reduce(items_K, "sum")
        return items_K.clamp(min=1)

    def _needs_own_loss(self, batch: StepBatch) -> bool:
        """Whether the model's own loss would not do: it knows no weights, and some models mis-scale it."""
        if self.head is None:
            return False
        if self._answered & {"example_weights", "token_weights", "extra_loss"} or self.example_loss_func is not None:
            return True
        if any(m.weights_B is not None for m in batch.micro_batches) or len(batch.plan.ids_N) < self.args.world_size:
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
        return losses.honours_num_items(self.model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not isinstance(inputs, StepBatch):
            with self.stopwatch.charge("backward"):  # what is not forward
                return super().training_step(model, inputs, num_items_in_batch)
        backward = functools.partial(self._accumulate, model, inputs, num_items_in_batch)
        if (owner := self._owners["objective"]) is None:
            return backward()
        with self._charge(owner):
            return owner.objective(model, backward)

    def _accumulate(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        """Forward and backward over the micro-batches of a step, in smaller ones where memory does not suffice."""
        if self.requested_micro_batch_size != "auto":
            return self._accumulate_once(model, batch, num_items)
        return memory.accumulate(self, model, batch, num_items)

    def _accumulate_once(self, model: nn.Module, batch: StepBatch, num_items: Any) -> Tensor:
        owner = self._owners["synchronise"]
        synchronised = owner is None or owner.synchronise()
        micros = batch.micro_batches
        # Our own loss is divided by what the whole step counts; there is nothing left to divide by.
        self.current_gradient_accumulation_steps = 1 if self._own_loss else len(micros)
        total = torch.zeros((), device=self.args.device)
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            always = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            sync = deepspeed or (synchronised and (last or always))
            self._micro = micro
            try:
                with contextlib.nullcontext() if sync else self.accelerator.no_sync(model):
                    with self.stopwatch.charge("backward"):
                        total = total + super().training_step(model, micro.inputs, num_items)
            finally:
                self._micro = None
            if not last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return total

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(send_to_device(inputs, self.args.device, non_blocking=True))

    # Losses ---------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        micro = self._micro
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
                self._observed.append((micro.ids_B, example.per_example(len(micro.ids_B))))
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
        for technique in self._asked("example_weights"):
            with self._charge(technique):
                weight_B = _product(weight_B, technique.example_weights(example, micro.ids_B))
        for technique in self._asked("token_weights"):
            with self._charge(technique):
                weight_BL = _product(weight_BL, technique.token_weights(example, micro.ids_B))
        loss = losses.weighted_mean(example, items_K, weight_B, weight_BL)
        for technique in self._asked("extra_loss"):
            with self._charge(technique):
                if (extra := technique.extra_loss(model, inputs, outputs)) is not None:
                    loss = loss + extra / items_K.sum()
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks
        return loss, outputs, example

    def _flush_observations(self) -> None:
        """Tell the techniques the losses of what was trained on, over all ranks."""
        if not self._observed:
            return
        ids, values = self._gathered(*(torch.cat(column) for column in zip(*self._observed, strict=True)))
        self._observed.clear()
        for technique in self._asked("observe"):
            with self._charge(technique):
                technique.observe(ids, values)

    def _gathered(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and values of all ranks, on the CPU, without fillers."""
        if self.args.world_size > 1:
            ids_B, values_B = ids_B.to(self.args.device), values_B.to(self.args.device)
            ids_B = self.accelerator.gather(self.accelerator.pad_across_processes(ids_B, pad_index=-1))
            values_B = self.accelerator.gather(self.accelerator.pad_across_processes(values_B))
        ids_B, values_B = ids_B.cpu(), values_B.detach().cpu()
        return ids_B[ids_B >= 0], values_B[ids_B >= 0]

    # After the gradient ---------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._step_refused = False
        for technique in self._asked("accept_step"):
            with self._charge(technique):
                self._step_refused |= not technique.accept_step(norm)
        if self._step_refused:
            # Optimizers pass over parameters without a gradient: neither moments nor weight decay move.
            model.zero_grad(set_to_none=True)
            self._skipped_steps += 1
        return norm

    def count_step(self) -> None:
        """Tell the clock what the step spent; before the learning rate of the next one is set."""
        tokens = self._count_tokens() if "tokens" in self.clock.limits else 0.0
        epochs = (self.state.global_step + 1) / self.steps_per_epoch if self.stream is None else self.stream.epochs
        self.clock.advance(
            steps=0 if self._step_refused else 1, samples=self._trained_samples, tokens=tokens, epochs=epochs
        )

    def _count_tokens(self) -> float:
        """Tokens since the last call, over all ranks."""
        tokens = torch.as_tensor(float(sum(self._uncounted)), dtype=torch.float64)
        self._uncounted.clear()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tokens, group=self._cpu_group)
        return tokens.item()

    def create_optimizer(self, model=None):
        owner = self._owners["optimizer"]
        if self.optimizer is not None or (owner is None and "parameter_rules" not in self._answered):
            return super().create_optimizer(model)
        model = self.model if model is None else model
        groups = self._parameter_groups(model)
        if owner is not None:
            self.optimizer = owner.optimizer(model, groups)
        else:
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or "params" in kwargs:
                raise ValueError(f"optim={self.args.optim}: it makes its own parameter groups. Choose another optimizer.")
            self.optimizer = cls([{k: v for k, v in g.items() if k != "names"} for g in groups], **kwargs)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by weight decay and by what the techniques say of each."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rules = [t.parameter_rules(name, parameter) for t in self._asked("parameter_rules")]
            lr = self.args.learning_rate * math.prod(rule.get("lr", 1.0) for rule in rules)
            decay = self.args.weight_decay if name in decayed else 0.0
            decay *= math.prod(rule.get("weight_decay", 1.0) for rule in rules)
            key = (lr, decay, "/".join(str(rule["group"]) for rule in rules if "group" in rule))
            group = groups.setdefault(
                key, {"params": [], "names": [], "lr": lr, "weight_decay": decay, "group": key[2]}
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def create_scheduler(self, num_training_steps, optimizer=None):
        if not self.paced or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        shape = self._named_shape() if (owner := self._owners["schedule"]) is None else owner.schedule
        self.lr_scheduler = LambdaLR(optimizer, lambda _: shape(self.clock.progress))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _named_shape(self) -> Callable[[float], float]:
        """Trainer's named schedule as a function of progress."""
        steps = self.nominal_steps or 10_000
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]

        def shape(progress: float) -> float:
            step = progress * steps
            # At whole steps, exactly Trainer's value.
            return factor(round(step) if abs(step - round(step)) < 1e-6 else step)

        return shape

    # Evaluation and saving ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _weights_for(self, hook: Literal["evaluating", "saving"]) -> Iterator[None]:
        """The weights that are evaluated and saved: averaged ones, and as the techniques' contexts leave them."""
        owner = self._owners["averaging"]
        averages = owner.averaging() if owner is not None and self.is_in_train else None
        if self._swapped:
            yield
            return
        self._swapped = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_swapped", False)
            if averages is not None:
                weights.swap(self.model, averages)
                stack.callback(weights.swap, self.model, averages)
            for technique in self._asked(hook):
                stack.enter_context(getattr(technique, hook)(self.model))
            yield

    def evaluate(self, *args, **kwargs):
        began = self.clock.seconds
        with self.stopwatch.charge("evaluation"), self._weights_for("evaluating"):
            metrics = super().evaluate(*args, **kwargs)
        self.evaluation_seconds = self.clock.seconds - began
        return metrics

    def predict(self, *args, **kwargs):
        with self.stopwatch.charge("evaluation"), self._weights_for("evaluating"):
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        with self._weights_for("saving"):
            super().save_model(output_dir, _internal_call)
        self._write_papers(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        began = self.clock.seconds
        with self.stopwatch.charge("saving"):
            self._flush_observations()
            self.clock.spent["tokens"] += self._count_tokens()
            run_dir = self._get_output_dir(trial=trial)
            directory = Path(run_dir, f"checkpoint-{self.state.global_step}")
            if self.args.should_save:
                ckpt.mark_incomplete(directory)
            self.accelerator.wait_for_everyone()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)  # rotates nothing: the new checkpoint is not complete yet
            finally:
                self.args.save_total_limit = limit
            self._save_state(directory)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                ckpt.mark_complete(directory)
                rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.saving_seconds = self.clock.seconds - began

    def _save_state(self, directory: Path) -> None:
        owner = self._owners["averaging"]
        averages = owner.averaging() if owner is not None else None
        if averages is not None:
            averages = weights.gather(self.model, averages)
        states = {scope: [t.state_dict(scope) for t in self.techniques] for scope in ("global", "rank")}
        if self.args.should_save:
            if averages is not None:
                ckpt.save_averaged(directory, averages)
            state: dict[str, Any] = {
                "run_id": self.run_id,
                "clock": self.clock.state_dict(),
                "techniques": [repr(t) for t in self.techniques],
                "states": states["global"],
                "skipped_steps": self._skipped_steps,
                "micro_batch_size": self.micro_batch_size,
            }
            if self.stream is not None:
                state["stream"] = self.stream.state_dict()
            ckpt.save_state(directory, ckpt.STATE, state)
            self._write_papers(directory)
        if any(states["rank"]):
            ckpt.save_state(directory, f"accel_rank{self.args.process_index}", {"states": states["rank"]})

    def _checkpoint_to_resume(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on from: the given one, or the newest whole one."""
        if not resume:
            return None
        if isinstance(resume, str | os.PathLike):
            if not Path(resume).is_dir():
                raise ckpt.CheckpointError(f"{resume}: there is no checkpoint. Name a checkpoint-N directory.")
            if (fault := ckpt.whats_wrong(resume)) is not None:
                whole, _ = ckpt.newest_complete(Path(resume).parent)
                remedy = f"Resume from {whole}." if whole else "There is no whole checkpoint beside it: start anew."
                raise ckpt.CheckpointError(f"{resume}: the checkpoint is not whole, {fault}. {remedy}")
            return str(resume)
        whole, passed_over = ckpt.newest_complete(self.args.output_dir)
        for name, fault in passed_over.items():
            logger.warning(f"{name}: passed over, {fault}.")
        if whole is None:
            raise ckpt.CheckpointError(
                f"{self.args.output_dir}: there is no whole checkpoint to resume from. Train without resuming first."
            )
        return str(whole)

    def _read_checkpoint(self, checkpoint: str) -> dict[str, Any]:
        """Our state in a checkpoint, after a check that it is of the same techniques."""
        state = ckpt.load_state(checkpoint, ckpt.STATE) if ckpt.has_state(checkpoint) else {"techniques": []}
        here, there = [repr(t) for t in self.techniques], state["techniques"]
        if here != there and not self.allow_changes:
            raise ckpt.CheckpointError(
                f"{checkpoint}: it was written with techniques [{', '.join(there)}], this run has [{', '.join(here)}]. "
                "Use the same, or allow_changes=True."
            )
        rank = f"accel_rank{self.args.process_index}"
        ranked = ckpt.load_state(checkpoint, rank) if Path(checkpoint, f"{rank}.json").is_file() else {}
        found: dict[str, Any] = {}
        for scope, states in (("global", state.get("states", [])), ("rank", ranked.get("states", []))):
            remaining = list(zip(there, states, strict=False))
            for name, technique in zip(here, self.techniques, strict=True):
                match = next((pair for pair in remaining if pair[0] == name), None)
                if match is not None:
                    remaining.remove(match)
                    found.setdefault(scope, []).append((technique, match[1]))
        state["found"] = found
        if "clock" in state:
            self.run_id = state["run_id"]
            self._skipped_steps = state["skipped_steps"]
            if self.requested_micro_batch_size == "auto":
                self.micro_batch_size = state["micro_batch_size"]
            self.clock.load_state_dict(state["clock"])
            self.clock.spent["seconds"] = max(self.clock.spent["seconds"], self._heartbeat_seconds())
        return state

    def restore_techniques(self) -> None:
        """Give the techniques their state; after their ``on_train_begin``."""
        for scope, pairs in (self._resumed or {}).get("found", {}).items():
            for technique, state in pairs:
                technique.load_state_dict(scope, state)

    def _heartbeat_path(self) -> Path:
        return Path(self.args.output_dir, "accel_heartbeat.json")

    def _heartbeat_seconds(self) -> float:
        """Seconds that a run which was killed had spent when last heard of."""
        try:
            beat = json.loads(self._heartbeat_path().read_text())
        except (OSError, json.JSONDecodeError):
            return 0.0
        return beat["seconds"] if beat["run_id"] == self.run_id else 0.0

    def beat(self) -> None:
        """Write down the seconds spent, for a run that is killed before its next checkpoint."""
        scratch = self._heartbeat_path().with_suffix(".tmp")
        scratch.write_text(json.dumps({"run_id": self.run_id, "seconds": self.clock.seconds}))
        scratch.replace(self._heartbeat_path())

    def _load_best_model(self):
        super()._load_best_model()
        averages = ckpt.load_averaged(self.state.best_model_checkpoint)
        if averages is not None and self._owners["averaging"] is not None:
            weights.swap(self.model, weights.scatter(self.model, averages))

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.clock.spent["tokens"] += self._count_tokens()
        self._flush_observations()
        self._final_learning_rate = self._get_learning_rate()
        owner = self._owners["averaging"]
        averages = owner.averaging() if owner is not None else None
        if averages is not None and not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            weights.swap(self.model, averages)
        self._reports = [dict(t.report()) for t in self.techniques]
        return super()._finalize_training(trial, self.clock.spent["samples"] or num_train_samples, start_time)

    def log(self, logs, start_time=None):
        if self.paced and self.is_in_train:
            logs["accel/progress"] = self.clock.progress
        return super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        if isinstance(inputs, StepBatch):
            return sum(super(AccelTrainerMixin, self).floating_point_ops(m.inputs) for m in inputs.micro_batches)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs):
        if not isinstance(inputs, StepBatch):
            return super()._track_num_input_tokens(inputs)
        for micro in inputs.micro_batches:
            super()._track_num_input_tokens(micro.inputs)

    # The receipt ----------------------------------------------------------------------------------------------------

    def _write_receipt(self) -> None:
        seconds = dict(self.stopwatch.seconds)
        self.receipt = Receipt(
            seconds=seconds,
            wall_seconds=self.clock.seconds,
            steps=self.state.global_step - self._skipped_steps,
            skipped_steps=self._skipped_steps,
            samples=self.clock.spent["samples"],
            tokens=self.clock.spent["tokens"],
            flops=self.state.total_flos,
            peak_memory_bytes=peak_memory_bytes(self.args.device),
            world_size=self.args.world_size,
            device=str(self.args.device),
            final_learning_rate=self._final_learning_rate,
            progress=self.clock.progress,
            budget=dict(self.clock.limits),
            techniques=[
                {"technique": repr(t), "seconds": seconds.get(name, 0.0), "report": report}
                for t, name, report in zip(self.techniques, self.technique_names, self._reports, strict=True)
            ],
        )
        if self.args.should_save:
            self._write_papers(self.args.output_dir)

    def _write_papers(self, directory: str | Path) -> None:
        """Write the recipe, and the receipt where there is one, beside a saved model."""
        if not self.args.should_save:
            return
        said = {"args": self._said, "techniques": self.techniques, "budget": None}
        dataclasses.replace(self.recipe, **said).save(Path(directory, "recipe.yaml"))
        if self.receipt is not None:
            self.receipt.save(Path(directory, "receipt.json"))

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            host.extend_model_card(Path(self.args.output_dir, "README.md"), self)


class AccelTrainer(AccelTrainerMixin, Trainer):
    """`transformers.Trainer` with ``techniques=[...]``."""


@functools.cache
def accelerated(trainer_class: type[Trainer]) -> type:
    """A subclass of any Trainer class that hosts techniques: ``accelerated(SFTTrainer)(..., techniques=[...])``."""
    if issubclass(trainer_class, AccelTrainerMixin):
        return trainer_class
    return type(f"Accel{trainer_class.__name__}", (AccelTrainerMixin, trainer_class), {})


def attach(
    trainer: Trainer,
    techniques: Sequence[Technique],
    *,
    micro_batch_size: int | Literal["auto"] | None = None,
    allow_changes: bool = False,
    example_loss_func: Callable | None = None,
) -> None:
    """Equip an existing trainer, before ``train()``; arguments as of `AccelTrainerMixin`."""
    if isinstance(trainer, AccelTrainerMixin):
        raise ValueError(f"attach({type(trainer).__name__}): it hosts techniques already. Give them to its constructor.")
    if trainer.is_in_train or trainer.state.global_step > 0:
        raise ValueError(f"attach({type(trainer).__name__}): it has begun to train. Attach before train().")
    host.check_signatures()
    trainer.recipe = Recipe()
    trainer.__class__ = accelerated(type(trainer))
    trainer._host(techniques, micro_batch_size, allow_changes, example_loss_func)
    args = trainer._prepared_args(trainer.args, trainer.train_dataset)
    rebuilt = host.accelerator_differs(trainer.args, args)
    trainer.args = args
    if rebuilt:
        trainer.create_accelerator_and_postprocess()
    for technique in techniques:
        trainer.add_callback(technique)
    trainer._settle()


def _charging(handler_class: type) -> type:
    """A callback handler that charges each technique for its events."""

    class ChargingHandler(handler_class):
        charge: Callable[[str], contextlib.AbstractContextManager]

        def call_event(self, event, args, state, control, **kwargs):
            every, numbers = self.callbacks, {}
            try:
                for callback in list(every):
                    self.callbacks = [callback]
                    if isinstance(callback, Technique):
                        host_ = callback.host_
                        with host_._charge(callback):
                            control = super().call_event(event, args, state, control, **kwargs)
                    else:
                        control = super().call_event(event, args, state, control, **kwargs)
                    every.extend(self.callbacks[1:])
            finally:
                self.callbacks = every
            return control

    return ChargingHandler


def _product(weight: Tensor | None, factor: Tensor | None) -> Tensor | None:
    if weight is None or factor is None:
        return weight if factor is None else factor
    return weight * factor


def _num_rows(inputs) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
