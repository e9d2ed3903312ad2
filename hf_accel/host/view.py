"""Give the engine access to the attributes and methods of Trainer that it uses, private ones by public names.

`AccelTrainerMixin` makes the one `TrainerView` of a trainer.  Nothing else in the engine knows the trainer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_accel.host.signatures import foreign_classes

PUBLIC = frozenset(
    "accelerator args callback_handler compute_loss compute_loss_context_manager compute_loss_func compute_metrics "
    "control create_accelerator_and_postprocess current_flos current_gradient_accumulation_steps data_collator "
    "eval_dataset get_decay_parameter_names get_eval_dataloader get_optimizer_cls_and_kwargs is_deepspeed_enabled "
    "is_fsdp_enabled is_in_train is_world_process_zero label_smoother loss_is_scaled_for_ga lr_scheduler model "
    "model_accepts_loss_kwargs model_init model_wrapped optimizer optimizer_cls_and_kwargs place_model_on_device "
    "pop_callback prediction_step processing_class state train_dataset".split()
)
"""Attributes and methods under Trainer's own names."""

PRIVATE = {
    "created_lr_scheduler": "_created_lr_scheduler",
    "get_collator_with_removed_columns": "_get_collator_with_removed_columns",
    "get_learning_rate": "_get_learning_rate",
    "get_num_items_in_batch": "_get_num_items_in_batch",
    "get_output_dir": "_get_output_dir",
    "loss_shifts_labels": "_loss_shifts_labels",
    "move_model_to_device": "_move_model_to_device",
    "prepare_inputs": "_prepare_inputs",
    "push_from_checkpoint": "_push_from_checkpoint",
    "remove_unused_columns": "_remove_unused_columns",
    "signature_columns": "_signature_columns",
    "train_batch_size": "_train_batch_size",
}
"""Private attributes and methods, by the engine's names for them."""


MAKERS_OF_LOADERS = ("get_train_dataloader", "_get_dataloader", "_get_train_sampler")
"""Methods that make the loader of the training set."""


class TrainerView:
    """Read and write the attributes of a trainer that `PUBLIC` and `PRIVATE` list, and no others."""

    def __init__(self, trainer: Trainer):
        object.__setattr__(self, "_trainer", trainer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, _name_in_trainer(name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._trainer, _name_in_trainer(name), value)

    @property
    def classes(self) -> list[type]:
        """Return the trainer's own classes, without ours, the nearest first."""
        return foreign_classes(type(self._trainer))

    def overrides(self, method: str) -> str | None:
        """Return the name of the class that replaces a method of Trainer, "trainer" for an instance, or None."""
        if method in vars(self._trainer):
            return "trainer"
        owner = next(cls for cls in self.classes if method in vars(cls))
        return None if owner is Trainer else owner.__name__

    def overrides_outside(self, method: str) -> type | None:
        """Return the class derived from ours that replaces a method, or None."""
        owner = next(cls for cls in type(self._trainer).__mro__ if method in vars(cls))
        return None if owner.__module__.startswith("hf_accel.") or owner is Trainer else owner

    def twin(self, model: nn.Module) -> Any:
        """Return a trainer like this one for another model, before its start and without the user's callbacks."""
        twin: Any = copy.copy(self._trainer)
        twin.args = copy.copy(self.args)
        if self.is_in_train:  # already applied to the copied model
            twin.neftune_noise_alpha = None
            twin.args.use_liger_kernel = False
        twin.model = twin.model_wrapped = model
        twin.model_init = twin.compute_metrics = None
        twin.optimizer = twin.lr_scheduler = None
        twin.state, twin.control = TrainerState(), TrainerControl()
        twin.callback_handler = CallbackHandler([DefaultFlowCallback], model, self.processing_class, None, None)
        return twin

    @contextlib.contextmanager
    def metrics_kept(self) -> Iterator[None]:
        """Forget what the trainer's own ``compute_loss`` records inside, as those of TRL do for their logs."""
        given = {name: value for name, value in vars(self._trainer).items() if name.endswith("_metrics")}
        kept = {name: copy.deepcopy(value) for name, value in given.items() if isinstance(value, dict)}
        try:
            yield
        finally:
            vars(self._trainer).update(kept)

    def with_frozen_config(self) -> Trainer:
        """Return a copy with a frozen configuration of the model, because growth may change the live one."""
        if not hasattr(self.model, "config"):
            return self._trainer
        saver: Any = copy.copy(self._trainer)
        model = object.__new__(type(self.model))  # copy.copy fails under FSDP2
        vars(model).update(vars(self.model), config=copy.deepcopy(self.model.config))
        saver.model = model
        return saver


def _name_in_trainer(name: str) -> str:
    if name in PUBLIC:
        return name
    if name in PRIVATE:
        return PRIVATE[name]
    raise AttributeError(f"TrainerView has no attribute {name!r}. List it in hf_accel.host.view.")
