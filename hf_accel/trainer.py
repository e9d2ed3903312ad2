"""Add techniques to `transformers.Trainer`: overrides of Trainer that ask the engine, and nothing else.

Trainer keeps its own training loop.  The mixin has one attribute, ``accel``, the `Engine`.  It answers Trainer's own
questions about batches, the loss, the learning rate and saving.  No line here knows a technique by name.  Without
techniques, nothing changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_accel import host, losses
from hf_accel.batch import StepBatch
from hf_accel.clock import Clock
from hf_accel.engine.engine import Engine
from hf_accel.engine.setup import Options
from hf_accel.receipt import Receipt
from hf_accel.recipe import Recipe
from hf_accel.stream.indexed import StepStream
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # mixed into any Trainer


class AccelTrainerMixin(Base):
    """Add techniques to any Trainer class; put the mixin first among the bases.

    Args:
        techniques: Techniques, in the order in which they are asked.
        recipe: A `Recipe` or its path.  Its techniques come first, and its arguments fill in those that are missing.
        micro_batch_size: Examples of one forward pass on one device.  None: ``per_device_train_batch_size``;
            ``"auto"``: the largest that fits, found by halving.  An update always has
            ``per_device_train_batch_size x gradient_accumulation_steps x ranks`` examples.
        allow_changes: Resume even if the checkpoint was written with other techniques, or if its files were edited.
        async_checkpoints: Write checkpoints during training (`hf_accel.checkpoints.background`), on one process, under
            DDP and FSDP2, from a copy of weights and optimizer state on the CPU.  Runs of the same kind can resume
            from these checkpoints, with this option or without.
        example_loss_func: ``(outputs, inputs) -> losses_B`` or a `losses.Head`, for models and trainers without one
            of the common losses.
    """

    accel: Engine
    """Everything that hf_accel adds to a trainer."""

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
        kind = host.arguments_kind(type(self))
        given = list(callbacks or ())
        techniques = [*techniques, *(callback for callback in given if isinstance(callback, Technique))]
        if recipe is not None:
            recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
            args = recipe.merge_args(args, kind)
            techniques = [*recipe.build_techniques(), *techniques]
        options = Options(micro_batch_size, allow_changes, async_checkpoints, example_loss_func)
        self.accel = Engine(self, techniques, options, recipe)
        args = self.accel.prepare_args(args or kind("tmp_trainer"), kwargs.get("train_dataset"))
        kwargs["callbacks"] = [*(callback for callback in given if not isinstance(callback, Technique)), *techniques]
        quantized = getattr(model, "is_quantized", False)
        if quantized:
            model = self.accel.prepare_quantized_model(model, args)
        if positional:
            super().__init__(model, args, *positional, **kwargs)
        else:  # by name, because some trainers do not take their arguments second
            super().__init__(model=model, args=args, **kwargs)
        self.accel.settle(model_is_prepared=quantized)

    # For users ------------------------------------------------------------------------------------------------------

    @property
    def techniques(self) -> list[Technique]:
        """Return the techniques, in the order in which they are asked."""
        return self.accel.roster.techniques

    @property
    def recipe(self) -> Recipe:
        """Return the recipe that the trainer was built from."""
        return self.accel.recipe

    @property
    def receipt(self) -> Receipt | None:
        """Return the receipt of the last ``train()``: its costs and reports; None before it ends."""
        return self.accel.receipt

    @property
    def clock(self) -> Clock:
        """Return the clock, with spent amounts, limits and progress."""
        return self.accel.meter.clock

    @property
    def stream(self) -> StepStream | None:
        """Return the stream of step batches, or None if Trainer's own loader is used."""
        return self.accel.step.stream

    @property
    def micro_batch_size(self) -> int:
        """Return the number of examples of one forward pass on one device."""
        return self.accel.step.micro_batch_size

    # The run --------------------------------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self.accel.prepare_model(super().call_model_init(trial))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        plain = super().train
        one_pass: Any = super().training_step
        return self.accel.train(resume_from_checkpoint, lambda found: plain(found, *args, **kwargs), one_pass)

    def _hp_search_setup(self, trial):
        self.accel.change_trial(trial, super()._hp_search_setup)

    def set_initial_training_values(self, args, dataloader):
        return self.accel.initial_values(args, super().set_initial_training_values(args, dataloader))

    def get_total_train_batch_size(self, args) -> int:
        streamed = self.accel.roster.streamed
        return self.accel.nominal_batch_size if streamed else super().get_total_train_batch_size(args)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        given = max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        return self.accel.initial_position(super()._init_training_state(*given))

    def _run_epoch(self, **kwargs):
        return self.accel.run_epoch(super()._run_epoch, kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        return super()._finalize_training(trial, self.accel.finish(num_train_samples), start_time)

    def log(self, logs, start_time=None):
        evaluated = any(key.startswith("eval_") for key in logs)  # a model card has a column for each of its keys
        if self.accel.roster.paced and self.is_in_train and not evaluated:
            logs["accel/progress"] = self.accel.meter.clock.progress
        return super().log(logs, start_time)

    # Steps ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        return self.accel.train_loader(super().get_train_dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        plain = functools.partial(super().get_batch_samples, epoch_iterator, num_batches, device)
        return self.accel.next_batches(epoch_iterator, plain)

    def training_step(self, model, inputs, num_items_in_batch=None):
        one_pass: Any = super().training_step
        return self.accel.step.run(model, inputs, num_items_in_batch, one_pass)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Any = None):
        return self.accel.step.loss(model, inputs, return_outputs, num_items_in_batch, super().compute_loss)

    def _prepare_inputs(self, inputs):
        moved: Any = send_to_device(inputs, self.args.device, non_blocking=True)
        return super()._prepare_inputs(moved)

    def _get_grad_norm(self, model, grad_norm=None):
        return self.accel.step.judge(model, super()._get_grad_norm(model, grad_norm))

    def floating_point_ops(self, inputs):
        return self.accel.flops(inputs, super().floating_point_ops)

    def _track_num_input_tokens(self, inputs):
        if not isinstance(inputs, StepBatch):
            return super()._track_num_input_tokens(inputs)
        for micro in inputs.micro_batches:
            super()._track_num_input_tokens(micro.inputs)

    def create_optimizer(self, model=None):
        return self.accel.make_optimizer(model, super().create_optimizer)

    def create_scheduler(self, num_training_steps, optimizer=None):
        return self.accel.optimization.make_scheduler(num_training_steps, optimizer, super().create_scheduler)

    # Evaluation and saving ------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        return self.accel.averages.evaluate(functools.partial(super().evaluate, *args, **kwargs))

    def evaluation_loop(self, *args, **kwargs):  # also called by a custom ``evaluate``
        return self.accel.averages.predict(functools.partial(super().evaluation_loop, *args, **kwargs))

    def predict(self, *args, **kwargs):
        return self.accel.averages.predict(functools.partial(super().predict, *args, **kwargs))

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call and output_dir is not None:  # a checkpoint; `push_to_hub` names no folder
            return super().save_model(output_dir, _internal_call)
        self.accel.save_model(output_dir, functools.partial(super().save_model, output_dir, _internal_call))

    def _save_checkpoint(self, model, trial):
        self.accel.checkpoints.save(trial, functools.partial(super()._save_checkpoint, model, trial))

    def _save(self, output_dir=None, state_dict=None):
        self.accel.writer.save_weights(output_dir, state_dict, super()._save, Trainer._save)

    def _save_optimizer_and_scheduler(self, output_dir):
        self.accel.writer.save_optimizer(output_dir, super()._save_optimizer_and_scheduler)

    def _push_from_checkpoint(self, checkpoint_folder):
        self.accel.checkpoints.push(checkpoint_folder, super()._push_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.accel.checkpoints.load_optimizer(checkpoint, super()._load_optimizer_and_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        plain = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.accel.checkpoints.load_weights(resume_from_checkpoint, plain)

    def _issue_warnings_after_load(self, load_result):
        super()._issue_warnings_after_load(self.accel.checkpoints.check_loaded(load_result))

    def _load_best_model(self):
        self.accel.checkpoints.load_best_model(super()._load_best_model)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            host.extend_model_card(Path(str(self.args.output_dir), "README.md"), self.techniques, self.receipt)


class AccelTrainer(AccelTrainerMixin, Trainer):
    """Train like `transformers.Trainer`, with ``techniques=[...]``."""


@functools.cache
def accelerated(trainer_class: type[Trainer]) -> type:
    """Return a subclass that takes techniques: ``accelerated(SFTTrainer)(..., techniques=[...])``."""
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
    """Add techniques to an existing trainer, before ``train()``; for the arguments, see `AccelTrainerMixin`.

    If this raises, the trainer is restored, except for changes that a technique has made to its model.
    """
    if isinstance(trainer, AccelTrainerMixin):
        raise ValueError(
            f"attach({type(trainer).__name__}): the trainer takes techniques itself. Pass them to its constructor."
        )
    if trainer.is_in_train or trainer.state.global_step > 0:
        raise ValueError(f"attach({type(trainer).__name__}): the trainer has begun to train. Attach before train().")
    host.check_signatures()
    handler = trainer.callback_handler
    changed = [(each, type(each), dict(vars(each))) for each in (trainer, handler)]
    callbacks = list(handler.callbacks)
    trainer.__class__ = accelerated(type(trainer))
    assert isinstance(trainer, AccelTrainerMixin)
    try:
        options = Options(micro_batch_size, allow_changes, async_checkpoints, example_loss_func)
        engine = trainer.accel = Engine(trainer, techniques, options)
        args = engine.prepare_args(trainer.args, trainer.train_dataset)
        rebuilt = host.accelerator_differs(trainer.args, args)
        trainer.args = args
        if rebuilt:
            trainer.create_accelerator_and_postprocess()
        for technique in techniques:
            trainer.add_callback(technique)
        engine.settle()
    except Exception:
        for each, each.__class__, attributes in changed:  # type: ignore[assignment]
            vars(each).clear()
            vars(each).update(attributes)
        handler.callbacks = callbacks
        raise
