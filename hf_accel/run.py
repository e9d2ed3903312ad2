"""What a technique sees of the run that asks its hooks: `Technique.run_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from hf_accel.batch import MicroBatch
from hf_accel.clock import Clock
from hf_accel.losses import Head

Result = TypeVar("Result")


class Run(Protocol):
    """A run, from the construction of its trainer to the end of ``train()``."""

    # What the trainer has.
    args: TrainingArguments
    model: nn.Module
    model_wrapped: nn.Module
    accelerator: Any
    optimizer: Any
    state: TrainerState
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    processing_class: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    is_in_train: bool

    # What the run adds to it.
    techniques: Sequence[Any]
    clock: Clock
    """What is spent, and of how much."""
    stream: Any
    """The `StepStream`, while one is used."""
    head: Head | None
    """What takes the loss apart, where it is known."""
    micro_batch: MicroBatch | None
    """What the present forward pass computes; None outside of one."""
    micro_batch_size: int
    nominal_batch_size: int
    """Examples of an update over all ranks, where no technique says otherwise."""
    nominal_steps: int | None
    """Updates that the budget buys, where that is known beforehand."""
    steps_per_epoch: int
    grad_norm: Any
    """Of the last step, before clipping."""
    learning_rate_factor: Callable[[float], float] | None
    """The factor on the peak learning rate at a progress, where the schedule follows the clock."""
    searched_hyperparameters: Mapping[str, Any]
    """What the present trial of a hyperparameter search sets; empty outside of one."""
    resumed: bool
    streamed: bool
    paced: bool

    def owner(self, slot: str) -> Any:
        """The technique that owns a slot; None where there is none."""

    def with_hook(self, hook: str) -> Sequence[Any]:
        """The techniques that answer a hook, in order."""
        ...

    def charge(self, technique: Any) -> AbstractContextManager:
        """Charge the time that is spent inside to a technique."""
        ...

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """What ``run`` returns, which computes the model over inputs; its operations are counted if they are limited.
        ``needed``: whether the model needs them for its gradient."""
        ...

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of examples and their values, of all ranks, on the CPU."""
        ...

    def find_head(self) -> Head | None:
        """What takes the loss of the present model apart; None where it is not known."""

    def prepare_inputs(self, inputs: dict[str, Any]) -> Mapping[str, Any]:
        """Inputs on the device, as the model is given them."""
        ...

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """A data set and its collator, one of which leaves out what the model does not take."""
        ...

    def unobserved(self) -> AbstractContextManager:
        """Forget the losses that are computed inside."""
        ...

    def resumed_state(self, technique: Any) -> Any:
        """What a technique's ``state_dict("global")`` gave for the checkpoint that the run resumes from, before it is
        loaded; None where there is none."""

    def first_step_cost(self) -> dict[str, float]:
        """What the first step has taken until its update, of the units that are known only afterward."""
        ...
