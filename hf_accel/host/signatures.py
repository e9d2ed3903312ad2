"""List the private names of transformers that hf_accel relies on, and compare them when a trainer is built."""

from __future__ import annotations

import inspect

import transformers
from transformers import Trainer

TESTED = ("5.17.0", "5.23.0")
"""Oldest and newest versions of transformers that the tests ran with."""

RELIED_ON = {
    "_finalize_training": "trial num_train_samples start_time",
    "_get_collator_with_removed_columns": "data_collator description",
    "_get_grad_norm": "model grad_norm",
    "_get_learning_rate": "",
    "_get_num_items_in_batch": "batch_samples device",
    "_get_output_dir": "trial",
    "_hp_search_setup": "trial",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_move_model_to_device": "model device",
    "_prepare_inputs": "inputs",
    "_push_from_checkpoint": "checkpoint_folder",
    "_remove_unused_columns": "dataset description",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_track_num_input_tokens": "inputs",
    "call_model_init": "trial",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_accelerator_and_postprocess": "",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_total_train_batch_size": "args",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "save_model": "output_dir _internal_call",
    "set_initial_training_values": "args dataloader",
    "training_step": "model inputs num_items_in_batch",
}
"""Trainer's methods that we override or call, with their parameters."""


def check_signatures() -> None:
    """Raise ImportError if this version of transformers has other signatures."""
    for name, parameters in RELIED_ON.items():
        method = getattr(Trainer, name, None)
        found = None if method is None else [p for p in inspect.signature(method).parameters if p != "self"]
        if found != parameters.split():
            raise ImportError(
                f"hf_accel does not support transformers {transformers.__version__} because Trainer.{name} has "
                f"changed. Install a tested version ({TESTED[0]} to {TESTED[1]})."
            )


def foreign_classes(kind: type) -> list[type]:
    """Return a trainer's classes without ours, the nearest first."""
    return [cls for cls in kind.__mro__ if not cls.__module__.startswith("hf_accel.")]
