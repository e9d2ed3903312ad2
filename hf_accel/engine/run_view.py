"""Show a run to its techniques; implement `hf_accel.run.Run`, which documents most members."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

from hf_accel.engine.data import without_unused_columns

Result = TypeVar("Result")


def _of(path: str) -> Any:
    """Return a property that reads an attribute of the engine."""
    read = operator.attrgetter(path)
    return property(lambda view: read(view.engine), doc=f"``{path}`` of the engine.")


class RunView:
    """Show techniques the public part of an engine and of its trainer."""

    def __init__(self, engine: Any):
        self.engine = engine

    # From the trainer.
    args = _of("host.args")
    model = _of("host.model")
    model_wrapped = _of("host.model_wrapped")
    accelerator = _of("host.accelerator")
    optimizer = _of("host.optimizer")
    state = _of("host.state")
    train_dataset = _of("host.train_dataset")
    eval_dataset = _of("host.eval_dataset")
    data_collator = _of("host.data_collator")
    processing_class = _of("host.processing_class")
    is_deepspeed_enabled = _of("host.is_deepspeed_enabled")
    is_fsdp_enabled = _of("host.is_fsdp_enabled")
    is_in_train = _of("host.is_in_train")
    is_world_process_zero = _of("host.is_world_process_zero")
    get_decay_parameter_names = _of("host.get_decay_parameter_names")
    optimizer_cls_and_kwargs = _of("host.optimizer_cls_and_kwargs")
    prepare_inputs = _of("host.prepare_inputs")

    # From the run.
    techniques = _of("roster.techniques")
    owner = _of("roster.owner")
    with_hook = _of("roster.with_hook")
    streamed = _of("roster.streamed")
    paced = _of("roster.paced")
    clock = _of("meter.clock")
    stopwatch = _of("meter.stopwatch")
    charge = _of("meter.charge")
    count_energy = _of("meter.count_energy")
    first_step_cost = _of("meter.first_step_cost")
    stream = _of("step.stream")
    head = _of("step.head")
    find_head = _of("find_head")
    micro_batch = _of("step.micro_batch")
    micro_batch_size = _of("step.micro_batch_size")
    requested_micro_batch_size = _of("options.micro_batch_size")
    grad_norm = _of("step.grad_norm")
    unobserved = _of("step.unobserved")
    nominal_batch_size = _of("nominal_batch_size")
    nominal_steps = _of("optimization.nominal_steps")
    steps_per_epoch = _of("steps_per_epoch")
    learning_rate_factor = _of("optimization.learning_rate_factor")
    searched_hyperparameters = _of("searched_hyperparameters")
    resumed = _of("resumed")
    resumed_state = _of("checkpoints.state_of")
    share = _of("ranks.share")
    gather = _of("ranks.gather")

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """Return the result of ``run``, which computes the model over inputs; count its operations if limited."""
        return self.engine.meter.count(self.model, inputs, run, needed=needed)

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""
        self.engine.host.current_flos += flops

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """Return a data set and its collator; one of them removes the columns that the model does not take."""
        return without_unused_columns(self.engine.host, dataset)
