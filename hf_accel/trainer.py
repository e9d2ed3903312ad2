"""The trainer only asks: a mixin over `transformers.Trainer` that hosts techniques.

The body of training stays Trainer's.  The mixin answers Trainer's own questions (which batches, which loss, which
learning rate, what is saved) by asking the techniques, and keeps the clock.  No line here knows a technique by name.

Without a technique nothing is changed.  With one that touches data or losses, batches come from the `StepStream`: one
step of Trainer is one `StepBatch`, whose micro-batches are looped over here (`training_step`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import has_length

from hf_accel import host, losses, weights
from hf_accel.clock import Clock
from hf_accel.engine import batch_norm, memory
from hf_accel.engine.callbacks import ClockCallback, RestoreCallback, SigtermCallback
from hf_accel.engine.optimization import Updating
from hf_accel.engine.resuming import Resuming
from hf_accel.receipt import Receipt, peak_memory_bytes
from hf_accel.recipe import Recipe
from hf_accel.stream.indexed import Slots, StepStream
from hf_accel.stream.iterable import IterableStepStream
from hf_accel.technique import Technique


class AccelTrainerMixin(Updating, Resuming):
    """Hosts techniques on any Trainer; comes first among the bases of a class.

    Args:
        techniques: Asked in this order.
        recipe: A `Recipe` or the path of one; its techniques come first, its arguments fill in what is not given.
        micro_batch_size: Examples of one forward pass on one device.  None: ``per_device_train_batch_size``;
            ``"auto"``: the largest that fits, found by halving.  The examples of an update stay
            ``per_device_train_batch_size x gradient_accumulation_steps x ranks``.
        allow_changes: Resume although the checkpoint was written with other techniques.
        async_checkpoints: Write checkpoints during training (`hf_accel.engine.saving`), on one process, under DDP and
            FSDP2; weights and optimizer state are copied to the CPU for it.  A run of the same kind resumes from
            them, with it or without.
        example_loss_func: ``(outputs, inputs) -> losses_B`` for models or trainers whose loss is none of the common
            heads', or a `losses.Head`.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        techniques: Sequence[Technique] = (),
        recipe: Recipe | str | Path | None = None,
        micro_batch_size: int | Literal["auto"] | None = None,
        allow_changes: bool = False,
        async_checkpoints: bool = False,
        example_loss_func: Callable | losses.Head | None = None,
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        host.check_signatures()
        given = list(callbacks or ())
        techniques = [*techniques, *(callback for callback in given if isinstance(callback, Technique))]
        self.recipe = Recipe()
        if recipe is not None:
            self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
            args = self.recipe.merge_args(args, host.arguments_kind(self))
            techniques = [*self.recipe.build_techniques(), *techniques]
        self._host(techniques, micro_batch_size, allow_changes, example_loss_func)
        self.async_checkpoints = async_checkpoints
        args = self._prepared_args(args or host.arguments_kind(self)("tmp_trainer"), kwargs.get("train_dataset"))
        others = [callback for callback in given if not isinstance(callback, Technique)]
        kwargs["callbacks"] = [*others, *self.techniques]
        quantized = getattr(model, "is_quantized", False)
        if quantized:  # Trainer refuses it unless it has adapters
            self.args = args
            model = self._prepared_model(model)
            host.refuse_quantized(model)
        if positional:
            super().__init__(model, args, *positional, **kwargs)
        else:  # by name, for not every trainer has its arguments second
            super().__init__(model=model, args=args, **kwargs)
        self._settle(prepared=quantized)

    # Construction ---------------------------------------------------------------------------------------------------

    def _prepared_args(self, args: TrainingArguments, dataset: Any) -> TrainingArguments:
        """The arguments that Trainer sees: those that were given, as techniques and the stream want them."""
        self._explicit_args = host.recorded_arguments(args)
        args = copy.copy(args)
        for technique in self.with_hook("prepare_args"):
            args = technique.prepare_args(args)
        if self._owners["budget"] is not None:
            host.refuse_two_budgets(args, self._owners["budget"])
            if dataset is not None and not has_length(dataset):
                host.refuse_unknown_epochs(self._owners["budget"], dataset)
                args.max_steps = sys.maxsize  # Trainer asks for a number where the data has no length
        host.refuse_two_optimizers(args, self._owners["optimizer"])
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

    def _settle(self, prepared: bool = False) -> None:
        """What can only be said once Trainer is built: the model unless ``prepared``, the loss, the size of a step."""
        if self.streamed:
            host.refuse_stream_hosts(self)
        self._refuse_asynchronous()
        if not prepared:
            self._replace_model()
        if self._owners["averaging"] is not None:
            batch_norm.refuse_iterables(self)
        if self.techniques and self.args.enable_jit_checkpoint:
            replaced: Any = self.pop_callback(JITCheckpointCallback)
            self.callback_handler.callbacks.insert(0, SigtermCallback(self, replaced))
        self.callback_handler.callbacks.insert(0, ClockCallback(self))
        self.callback_handler.callbacks.append(RestoreCallback(self))
        self.callback_handler.__class__ = _charging(type(self.callback_handler))
        self.meters = {} if self._owners["budget"] is None else self._owners["budget"].meters()
        self.head = self.find_head() if self.streamed else None
        self._settle_sizes()

    def _settle_sizes(self) -> None:
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
        for technique in self.with_hook("prepare_model"):
            model = technique.prepare_model(model)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._prepared_model(super().call_model_init(trial))

    def find_head(self) -> losses.Head | None:
        """The kind of loss; needed where a technique asks for the loss of an example."""
        needing = [t for t in self.techniques if t.implemented_hooks() & host.NEEDS_EXAMPLE_LOSSES]
        try:
            if self.example_loss_func is not None:
                head = losses.head_from(self.example_loss_func)
            elif self.compute_loss_func is not None:
                raise ValueError("compute_loss_func gives one loss for all examples. Give example_loss_func= as well.")
            else:
                host.refuse_own_losses(self)
                head = losses.head_of(self.model)
        except ValueError as error:
            if needing:
                raise ValueError(f"{', '.join(map(repr, needing))} needs a loss for each example: {error}") from None
            return None
        for technique in self.with_hook("loss_head"):
            head = technique.loss_head(head)
        return head

    # The run --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        self.finish_saving()  # of a run that was interrupted
        self.stopwatch.seconds.clear()
        self._ended = False
        self._skipped_steps = 0
        self._trained_samples = 0.0
        self._tokens_before = self._tokens_of_step = 0
        self._observed.clear()
        self._flops_by_size.clear()
        self.stream = self.continuation_point = None
        self.run_id = uuid.uuid4().hex
        self.clock = Clock(self._limits(), now=self.clock.now, share=self._share)
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._resumed = None if checkpoint is None else self._read_checkpoint(checkpoint)
        self._start_counting()
        if self.args.device.type == "cuda" and not self.is_in_train:  # a trial within a run is a part of it
            torch.cuda.reset_peak_memory_stats(self.args.device)
        with self.stopwatch.charge("other"):
            output = super().train(checkpoint, *args, **kwargs)
        self.count_energy()
        self._write_receipt()
        return output

    def _start_counting(self) -> None:
        """Begin to count what is spent; the seconds of a budget that has begun before are set aside."""
        if (passed := self.meters.get("seconds")) is None:
            self.clock.start()
        else:
            self.clock.spent["seconds"] = 0.0
            self.clock.start(ago=passed())
            if self._resumed is None:
                self.clock.excluded_cost = {"seconds": self.clock.seconds}
        if "joules" in self.meters:
            self._joules_read = self.meters["joules"]()

    def _limits(self) -> dict[str, float]:
        if self._owners["budget"] is not None:
            return dict(self._owners["budget"].budget())
        if self.args.max_steps > 0:
            return {"steps": float(self.args.max_steps)}
        return {"epochs": float(self.args.num_train_epochs)}

    def _hp_search_setup(self, trial):
        """A trial has arguments of its own: sizes and length of the run are those that it says."""
        if self.streamed:
            self.args.gradient_accumulation_steps = self.accumulation_steps
        super()._hp_search_setup(trial)
        self.searched_hyperparameters = dict(trial if isinstance(trial, dict) else getattr(trial, "params", {}))
        self.accumulation_steps = self.args.gradient_accumulation_steps
        if self.streamed:
            self.args.gradient_accumulation_steps = 1
        if self.techniques and trial is not None:
            self._train_batch_size = self.args.train_batch_size
            self._settle_sizes()
            self.clock.limits = self._limits()

    # Data -----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        if self.streamed and self.model_init is not None:  # which has made another model
            self.head = self.find_head()
            vars(self).pop("_host_scales_rightly", None)
        given = self.train_dataset
        try:
            for technique in self.with_hook("prepare_dataset"):
                with self.charge(technique):
                    self.train_dataset = technique.prepare_dataset(self.train_dataset)
            for technique in self.with_hook("inspect_dataset"):
                with self.charge(technique):
                    technique.inspect_dataset(self.train_dataset)
            if not self.streamed or given is None:
                return super().get_train_dataloader()
            self.stream = self._make_stream(self.train_dataset)
        finally:
            self.train_dataset = given
        if self._resumed is not None and "stream" in self._resumed:
            self.stream.load_state_dict(self._resumed["stream"])
        return self.stream

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """A data set and its collator, one of which leaves out what the model does not take."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description="training"), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def _make_stream(self, dataset: Any) -> StepStream:
        args = self.args
        dataset, collator = self.without_unused_columns(dataset)
        kind: Any = StepStream
        if isinstance(dataset, IterableDataset):
            nominal_examples = args.max_steps * self.nominal_batch_size if args.max_steps > 0 else math.inf
            kind = functools.partial(IterableStepStream, nominal_examples=nominal_examples)
        return kind(
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
        self.steps_per_epoch = int(values[1] or 1)
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
        if self._resumed is None:
            return position
        if self.stream is not None and "stream" not in self._resumed:
            self.stream.pass_over(*position)
        if "clock" not in self._resumed:  # of a plain Trainer
            steps, epochs = self.state.global_step, self.state.epoch
            if self.stream is not None:
                epochs = self.stream.epochs if self.stream.consumed else position[0]
            self.clock.advance(steps=steps, samples=steps * self.nominal_batch_size, epochs=epochs)
        if self.stream is None:
            return position
        if "stream" not in self._resumed:
            return position[0], 0
        return self.stream.epoch + int(self.stream.epoch_is_over), 0

    def _run_epoch(self, **kwargs):
        if self.techniques and self._resumed is not None and self.clock.done:
            self.control.should_training_stop = True  # Trainer would take one step more
            return None
        if self.stream is not None:
            self._flush_observations()
            # The stream ends its epochs itself (see `ClockCallback`): how many steps they have is not known beforehand.
            kwargs.update(steps_in_epoch=sys.maxsize, num_update_steps_per_epoch=sys.maxsize)
        return super()._run_epoch(**kwargs)

    # Evaluation and saving ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _weights_for(self, hook: Literal["evaluating", "saving"]) -> Iterator[None]:
        """The weights that are evaluated and saved: averaged ones, and as the techniques' contexts leave them."""
        if self._swapped:
            yield
            return
        averages = self._averages() if self.is_in_train and not self._ended else None
        self._swapped = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_swapped", False)
            if averages is not None:
                weights.swap(self.model, averages)
                stack.callback(weights.swap, self.model, averages)
            for technique in self.with_hook(hook):
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
        if _internal_call and output_dir is not None:  # a checkpoint; `push_to_hub` names no folder
            return super().save_model(output_dir, _internal_call)
        with self._weights_for("saving"):
            super().save_model(output_dir, _internal_call)
        self._write_run_metadata(output_dir or self.args.output_dir)

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.finish_saving()
        self.clock.spent["tokens"] += self._count_tokens()
        self._flush_observations()
        self._final_learning_rate = self._get_learning_rate()
        keeps_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        if not keeps_best and (averages := self._averages()) is not None:
            weights.swap(self.model, averages)
        self._reports = [dict(t.report()) for t in self.techniques]
        self._ended = True  # the model is what `train` returns
        if samples := self.clock.spent["samples"]:  # Trainer wants those of the whole schedule
            num_train_samples = samples * self.state.max_steps / max(self.state.global_step, 1)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs, start_time=None):
        evaluated = any(key.startswith("eval_") for key in logs)  # a model card makes a column of each of its keys
        if self.paced and self.is_in_train and not evaluated:
            logs["accel/progress"] = self.clock.progress
        return super().log(logs, start_time)

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
            executed_flops=self.clock.spent["flops"] if "flops" in self.meters else None,
            model_flops=self.clock.model_flops if "flops" in self.meters else None,
            joules=self.clock.spent["joules"] if "joules" in self.meters else None,
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
            self._write_run_metadata(self.args.output_dir)

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
    async_checkpoints: bool = False,
    example_loss_func: Callable | losses.Head | None = None,
) -> None:
    """Equip an existing trainer, before ``train()``; arguments as of `AccelTrainerMixin`.

    Where something is refused, the trainer stays as it was, but for what a technique did to its model.
    """
    if isinstance(trainer, AccelTrainerMixin):
        raise ValueError(
            f"attach({type(trainer).__name__}): it hosts techniques already. Give them to its constructor."
        )
    if trainer.is_in_train or trainer.state.global_step > 0:
        raise ValueError(f"attach({type(trainer).__name__}): it has begun to train. Attach before train().")
    host.check_signatures()
    handler = trainer.callback_handler
    before = type(trainer), dict(vars(trainer)), type(handler), list(handler.callbacks)
    trainer.__class__ = accelerated(type(trainer))
    assert isinstance(trainer, AccelTrainerMixin)
    try:
        trainer.recipe = Recipe()
        trainer._host(techniques, micro_batch_size, allow_changes, example_loss_func)
        trainer.async_checkpoints = async_checkpoints
        args = trainer._prepared_args(trainer.args, trainer.train_dataset)
        rebuilt = host.accelerator_differs(trainer.args, args)
        trainer.args = args
        if rebuilt:
            trainer.create_accelerator_and_postprocess()
        for technique in techniques:
            trainer.add_callback(technique)
        trainer._settle()
    except Exception:
        trainer.__class__, attributes, handler.__class__, handler.callbacks = before  # type: ignore[assignment]
        vars(trainer).clear()
        vars(trainer).update(attributes)
        raise


GIVEN_TO_CALLBACKS = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
"""By Trainer's handler of callbacks, beside arguments, state and control."""


def _listens(callback: TrainerCallback, event: str) -> bool:
    return getattr(type(callback), event) is not getattr(TrainerCallback, event, None)


def _charging(handler_class: type) -> type:
    """A callback handler that charges each technique for its events."""

    class ChargingHandler(handler_class):
        def call_event(self, event, args, state, control, **kwargs):
            if not any(isinstance(c, Technique) and _listens(c, event) for c in self.callbacks):
                return super().call_event(event, args, state, control, **kwargs)
            given: dict[str, Any] = {name: getattr(self, name) for name in GIVEN_TO_CALLBACKS} | kwargs
            for callback in self.callbacks:  # which may change them, as in Trainer
                hosted = isinstance(callback, Technique)
                with callback.run_.charge(callback) if hosted else contextlib.nullcontext():
                    control = getattr(callback, event)(args, state, control, **given) or control
            return control

    return ChargingHandler
