"""Show a run to its techniques; implement `hf_accel.run.Run`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from hf_accel.engine.data import without_unused_columns

if TYPE_CHECKING:
    from hf_accel.batch import MicroBatch
    from hf_accel.clock import Clock
    from hf_accel.losses import Head
    from hf_accel.stream.indexed import StepStream
    from hf_accel.technique import Technique

Result = TypeVar("Result")


def _of_trainer(name: str) -> Any:
    return property(lambda view: getattr(view.engine.host, name), doc=f"``{name}`` of the trainer.")


class RunView:
    """Show techniques the public part of an engine and of its trainer."""

    def __init__(self, engine: Any):
        self.engine = engine

    args = _of_trainer("args")
    model = _of_trainer("model")
    model_wrapped = _of_trainer("model_wrapped")
    accelerator = _of_trainer("accelerator")
    optimizer = _of_trainer("optimizer")
    state = _of_trainer("state")
    train_dataset = _of_trainer("train_dataset")
    eval_dataset = _of_trainer("eval_dataset")
    data_collator = _of_trainer("data_collator")
    processing_class = _of_trainer("processing_class")
    is_deepspeed_enabled = _of_trainer("is_deepspeed_enabled")
    is_fsdp_enabled = _of_trainer("is_fsdp_enabled")
    is_in_train = _of_trainer("is_in_train")
    is_world_process_zero = _of_trainer("is_world_process_zero")
    get_decay_parameter_names = _of_trainer("get_decay_parameter_names")
    optimizer_cls_and_kwargs = _of_trainer("optimizer_cls_and_kwargs")

    @property
    def techniques(self) -> list[Technique]:
        """Return all techniques, in the order in which they are asked."""
        return self.engine.roster.techniques

    @property
    def clock(self) -> Clock:
        """Return the clock, with spent amounts, limits and progress."""
        return self.engine.meter.clock

    @property
    def stopwatch(self) -> Any:
        """Return the stopwatch, which keeps the seconds of each phase."""
        return self.engine.meter.stopwatch

    @property
    def stream(self) -> StepStream | None:
        """Return the stream of step batches, or None if Trainer's own loader is used."""
        return self.engine.step.stream

    @property
    def head(self) -> Head | None:
        """Return the head, which splits the loss into losses of items, or None if it is unknown."""
        return self.engine.step.head

    @property
    def micro_batch(self) -> MicroBatch | None:
        """Return the micro-batch of the current forward pass; None outside of one."""
        return self.engine.step.micro_batch

    @property
    def micro_batch_size(self) -> int:
        """Return the number of examples of one forward pass on this rank."""
        return self.engine.step.micro_batch_size

    @property
    def requested_micro_batch_size(self) -> int | Literal["auto"] | None:
        """Return the micro-batch size that the user requested."""
        return self.engine.options.micro_batch_size

    @property
    def nominal_batch_size(self) -> int:
        """Return the number of examples of an update over all ranks, unless a technique decides."""
        return self.engine.nominal_batch_size

    @property
    def nominal_steps(self) -> int | None:
        """Return the expected updates of the budget, or None if they are unknown in advance."""
        return self.engine.optimization.nominal_steps

    @property
    def steps_per_epoch(self) -> int:
        """Return the nominal number of steps of an epoch."""
        return self.engine.steps_per_epoch

    @property
    def grad_norm(self) -> Any:
        """Return the gradient norm of the last step, before clipping."""
        return self.engine.step.grad_norm

    @property
    def learning_rate_factor(self) -> Callable[[float], float] | None:
        """Return the factor on the peak learning rate by progress, or None if the schedule ignores the clock."""
        return self.engine.optimization.learning_rate_factor

    @property
    def searched_hyperparameters(self) -> Any:
        """Return the values of the current trial of a hyperparameter search; empty outside of one."""
        return self.engine.searched_hyperparameters

    @property
    def resumed(self) -> bool:
        """Return whether the run resumes from a checkpoint."""
        return self.engine.resumed

    @property
    def streamed(self) -> bool:
        """Return whether batches come from the stream."""
        return self.engine.roster.streamed

    @property
    def paced(self) -> bool:
        """Return whether Trainer's notion of time follows the clock."""
        return self.engine.roster.paced

    def owner(self, slot: str) -> Technique | None:
        """Return the technique that owns a slot, or None."""
        return self.engine.roster.owner(slot)

    def with_hook(self, hook: str) -> list[Technique]:
        """Return the techniques that implement a hook, in order."""
        return self.engine.roster.with_hook(hook)

    def charge(self, technique: Technique) -> AbstractContextManager:
        """Charge the time that is spent inside to a technique."""
        return self.engine.meter.charge(technique)

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """Return the result of ``run``, which computes the model over inputs; count its operations if limited."""
        return self.engine.meter.count(self.model, inputs, run, needed=needed)

    def count_energy(self) -> None:
        """Add the energy since the last step to the clock."""
        self.engine.meter.count_energy()

    def first_step_cost(self) -> dict[str, float]:
        """Return the cost of the first step until its update, in the units that are known only afterward."""
        return self.engine.meter.first_step_cost()

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""
        self.engine.host.current_flos += flops

    def share(self, values: list[float]) -> list[float]:
        """Return the values of rank 0 on every rank."""
        return self.engine.ranks.share(values)

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids of examples and their values from all ranks, on the CPU."""
        return self.engine.ranks.gather(ids_B, values_B)

    def find_head(self) -> Head | None:
        """Return the head of the current model, or None if its loss is unknown."""
        return self.engine.find_head()

    def prepare_inputs(self, inputs: dict[str, Any]) -> Any:
        """Return inputs on the device, as the model receives them."""
        return self.engine.host.prepare_inputs(inputs)

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """Return a data set and its collator; one of them removes the columns that the model does not take."""
        return without_unused_columns(self.engine.host, dataset)

    def unobserved(self) -> AbstractContextManager:
        """Forget the losses that are computed inside."""
        return self.engine.step.unobserved()

    def resumed_state(self, technique: Technique) -> Any:
        """Return a technique's ``state_dict("global")`` in the checkpoint of a resumed run, or None."""
        return self.engine.checkpoints.state_of(technique)
