"""Define the interface through which a technique sees its run: `Technique.run_`."""

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

    # From the trainer.
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

    # From the run.
    techniques: Sequence[Any]
    clock: Clock
    """Spent amounts, limits and progress."""
    stream: Any
    """The `StepStream`, while one is used."""
    head: Head | None
    """Splits the loss into losses of items, if it is known."""
    micro_batch: MicroBatch | None
    """Inputs of the current forward pass; None outside of one."""
    micro_batch_size: int
    nominal_batch_size: int
    """Examples of an update over all ranks, unless a technique decides."""
    nominal_steps: int | None
    """Expected updates of the budget, if they are known in advance."""
    steps_per_epoch: int
    grad_norm: Any
    """Gradient norm of the last step, before clipping."""
    learning_rate_factor: Callable[[float], float] | None
    """Factor on the peak learning rate as a function of progress, if the schedule follows the clock."""
    searched_hyperparameters: Mapping[str, Any]
    """Values of the current trial of a hyperparameter search; empty outside of one."""
    resumed: bool
    streamed: bool
    paced: bool

    def owner(self, slot: str) -> Any:
        """Return the technique that owns a slot, or None."""

    def with_hook(self, hook: str) -> Sequence[Any]:
        """Return the techniques that implement a hook, in order."""
        ...

    def charge(self, technique: Any) -> AbstractContextManager:
        """Charge the time that is spent inside to a technique."""
        ...

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """Return the result of ``run``, which computes the model over inputs; count its operations if they are limited.

        ``needed``: True if the model needs them for its gradient.
        """
        ...

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids of examples and their values from all ranks, on the CPU."""
        ...

    def find_head(self) -> Head | None:
        """Return the head of the current model, or None if its loss is unknown."""

    def prepare_inputs(self, inputs: dict[str, Any]) -> Mapping[str, Any]:
        """Return inputs on the device, as the model receives them."""
        ...

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """Return a data set and its collator; one of them removes the columns that the model does not take."""
        ...

    def unobserved(self) -> AbstractContextManager:
        """Forget the losses that are computed inside."""
        ...

    def resumed_state(self, technique: Any) -> Any:
        """Return a technique's ``state_dict("global")`` in the checkpoint of a resumed run, before it is loaded.

        Return None if there is none.
        """

    def first_step_cost(self) -> dict[str, float]:
        """Return the cost of the first step until its update, in the units that are known only afterward."""
        ...
