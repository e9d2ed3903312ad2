"""The run as the techniques see it; implements `hf_accel.run.Run`."""

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
    """What techniques see of an engine and of its trainer."""

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
        """All of them, in the order in which they are asked."""
        return self.engine.roster.techniques

    @property
    def clock(self) -> Clock:
        """What is spent, and of how much."""
        return self.engine.meter.clock

    @property
    def meters(self) -> Any:
        """What measures operations, energy and the seconds of a job."""
        return self.engine.meter.gauges

    @property
    def stopwatch(self) -> Any:
        """The seconds by phase."""
        return self.engine.meter.stopwatch

    @property
    def stream(self) -> StepStream | None:
        """The stream of step batches, while one is used."""
        return self.engine.step.stream

    @property
    def head(self) -> Head | None:
        """What takes the loss apart, where it is known."""
        return self.engine.step.head

    @property
    def micro_batch(self) -> MicroBatch | None:
        """What the present forward pass computes; None outside of one."""
        return self.engine.step.micro_batch

    @property
    def micro_batch_size(self) -> int:
        """Examples of one forward pass on this rank."""
        return self.engine.step.micro_batch_size

    @property
    def requested_micro_batch_size(self) -> int | Literal["auto"] | None:
        """What the user asked for."""
        return self.engine.options.micro_batch_size

    @property
    def nominal_batch_size(self) -> int:
        """Examples of an update over all ranks, where no technique says otherwise."""
        return self.engine.nominal_batch_size

    @property
    def nominal_steps(self) -> int | None:
        """Updates that the budget buys, where that is known beforehand."""
        return self.engine.optimization.nominal_steps

    @property
    def steps_per_epoch(self) -> int:
        """Nominal steps of an epoch."""
        return self.engine.steps_per_epoch

    @property
    def grad_norm(self) -> Any:
        """Of the last step, before clipping."""
        return self.engine.step.grad_norm

    @property
    def learning_rate_factor(self) -> Callable[[float], float] | None:
        """The factor on the peak learning rate at a progress, where the schedule follows the clock."""
        return self.engine.optimization.learning_rate_factor

    @property
    def searched_hyperparameters(self) -> Any:
        """What a hyperparameter search chose for this run."""
        return self.engine.searched_hyperparameters

    @property
    def resumed(self) -> bool:
        """Whether the run began in an earlier process."""
        return self.engine.resumed

    @property
    def streamed(self) -> bool:
        """Whether batches come from the stream."""
        return self.engine.roster.streamed

    @property
    def paced(self) -> bool:
        """Whether Trainer's notion of time follows the clock."""
        return self.engine.roster.paced

    def owner(self, slot: str) -> Technique | None:
        """The technique that owns a slot."""
        return self.engine.roster.owner(slot)

    def with_hook(self, hook: str) -> list[Technique]:
        """The techniques that answer a hook, in order."""
        return self.engine.roster.with_hook(hook)

    def charge(self, technique: Technique) -> AbstractContextManager:
        """Charge the time that is spent inside to a technique."""
        return self.engine.meter.charge(technique)

    def count(self, inputs: Any, run: Callable[[], Result], *, needed: bool = True) -> Result:
        """What ``run`` returns, which computes the model over inputs; its operations are counted if limited."""
        return self.engine.meter.count(self.model, inputs, run, needed=needed)

    def count_energy(self) -> None:
        """Tell the clock the energy since the last step."""
        self.engine.meter.count_energy()

    def first_step_cost(self) -> dict[str, float]:
        """What the first step has taken until its update."""
        return self.engine.meter.first_step_cost()

    def add_flops(self, flops: float) -> None:
        """Add operations, by Trainer's rule, to those of the run."""
        self.engine.host.current_flos += flops

    def share(self, values: list[float]) -> list[float]:
        """The values of rank 0, on every rank."""
        return self.engine.ranks.share(values)

    def gather(self, ids_B: Tensor, values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of examples and their values, of all ranks, on the CPU."""
        return self.engine.ranks.gather(ids_B, values_B)

    def find_head(self) -> Head | None:
        """What takes the loss of the present model apart; None where it is not known."""
        return self.engine.find_head()

    def prepare_inputs(self, inputs: dict[str, Any]) -> Any:
        """Inputs on the device, as the model is given them."""
        return self.engine.host.prepare_inputs(inputs)

    def without_unused_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """A data set and its collator, one of which leaves out what the model does not take."""
        return without_unused_columns(self.engine.host, dataset)

    def unobserved(self) -> AbstractContextManager:
        """Forget the losses that are computed inside."""
        return self.engine.step.unobserved()

    def resumed_state(self, technique: Technique) -> Any:
        """What ``state_dict("global")`` gave for the checkpoint that the run resumes from; None where there is none."""
        return self.engine.checkpoints.state_of(technique)
