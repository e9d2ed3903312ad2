"""Define a technique: a ``TrainerCallback`` with hooks and slots, which change how a run trains.

A technique uses the events of ``transformers.TrainerCallback``, and two kinds of methods that a callback lacks:

- *Hooks*: several techniques may implement the same hook; its docstring says how their results combine.
- *Slots*: at most one technique of a run owns each.

Override a method to implement a hook or to own a slot; there is nothing to register.  "In order" means the order of
the trainer's ``techniques``: each call receives the result of the previous one.

Shape suffixes: ``B`` examples, ``L`` positions, ``N`` examples of the data set.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_accel.bounds import check_bounds, check_decorated

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch
    from hf_accel.clock import Limits
    from hf_accel.losses import ExampleLosses, Head

Fraction = Annotated[float, at.Interval(ge=0, le=1)]
"""A share of a whole, in [0, 1]."""

Positive = Annotated[float, at.Gt(0)]
"""A number above zero."""

SLOTS = (
    "budget",
    "select",
    "order",
    "batch",
    "collate",
    "step_select",
    "objective",
    "optimizer",
    "schedule",
    "averaging",
    "synchronize",
)
"""Methods of `Technique` that at most one technique of a run may override."""

HOOKS = (
    "prepare_args",
    "prepare_dataset",
    "inspect_dataset",
    "prepare_model",
    "parameter_rules",
    "loss_head",
    "transform_batch",
    "loss_weights",
    "extra_loss",
    "for_inference",
    "observe",
    "accept_step",
)
"""Methods of `Technique` that every technique of a run may override."""

STREAM = frozenset(
    "prepare_dataset select order batch collate step_select objective loss_head transform_batch "
    "loss_weights extra_loss observe synchronize".split()
)
"""Hooks and slots that take batches from the `StepStream`."""

CLAIMS = {
    "block_positions": "the positions of blocks, which one of them changes",
    "early_weights": "the weights of early steps, which one of them averages and the other replaces",
    "frozen_blocks": "which blocks are trained, by positions that one of them changes",
    "initial_blocks": "the weights of the first blocks, which one of them writes and the other replaces",
    "initial_weights": "the first weights of the model",
    "layer_types": "the type of the linear layers",
    "logits": "the logits, which one of them reads and the other never computes",
    "own_weights": "the weights of a rank, which one of them averages and the other selects on each rank",
    "pretrained_weights": "the weights under adapters, which one of them writes and the other never saves",
    "slow_weights": "the weights that are averaged, which one of them replaces by factors",
    "synchronization": "what ranks exchange, which growth would change",
    "weight_matrices": "the form of the weight matrices",
}
"""Claims of techniques, each with its description in errors.  Your own techniques may add others."""

State = Mapping[str, Any]
"""Tensors, numbers, strings, and lists and dicts of these."""


class Diverged(RuntimeError):
    """Report that a technique gives up the run because it refused too many updates in a row."""


@dataclasses.dataclass(eq=False)
class Technique(TrainerCallback):
    """Change training through events, hooks and slots; the base class of every technique.

    Make each subclass a dataclass.  Its fields are the hyperparameters, each with a default, and the constructor stores
    nothing else.  Keep state of a run in attributes that end with ``_``.  Create them in ``on_train_begin`` or
    `prepare_dataset`, so that one instance may train twice.
    """

    fidelity: ClassVar[Literal["exact", "unbiased", "lossy"]] = "lossy"
    """``exact``: the same result; ``unbiased``: the same gradient in expectation; ``lossy``: another result."""

    neutral: ClassVar[Mapping[str, Any] | None] = None
    """Hyperparameters with which training equals training without the technique, bit for bit; None if none exist."""

    expected_failed_checks: ClassVar[Mapping[str, str]] = {}
    """Checks of the contract that fail, each with its reason."""

    refused_backends: ClassVar[Mapping[str, str]] = {}
    """Distributed backends (``ddp``, ``fsdp2``, ``zero``) that are refused before the first step, with reasons."""

    variations: ClassVar[Mapping[str, Any]] = {}
    """Another value of a field, for the contract to try; needed if no such value can be guessed from its type."""

    modality: ClassVar[Literal["text", "masked text", "replaced text", "image", "speech"]] = "text"
    """Modality that the contract trains on; ``text`` if any will do."""

    probe_fields: ClassVar[dict[str, Any]] = {}
    """Hyperparameters for the contract's runs, if the defaults need a rare device or a long run."""

    probe_micro_batch_size: ClassVar[int | None] = None
    """Examples of a micro-batch in the contract's runs; None: one micro-batch per step."""

    claims: ClassVar[frozenset[str]] = frozenset()
    """Keys of `CLAIMS` that no other technique of the run may share."""

    decides_by_weights: ClassVar[bool] = False
    """True if it decides by a rank's weights or gradients, so that all ranks must hold the same weights."""

    counters: ClassVar[tuple[str, ...]] = ()
    """Names of attributes to checkpoint, without the trailing ``_``, with the same value on every rank."""

    rank_counters: ClassVar[tuple[str, ...]] = ()
    """Names of attributes to checkpoint on each rank, without the trailing ``_``."""

    run_: ClassVar[Any] = None
    """Current run (`hf_accel.run.Run`), set on the instance by the trainer; None in a plain Trainer."""

    def __post_init__(self) -> None:
        check_decorated(type(self))
        check_bounds(self)

    # Before training ------------------------------------------------------------------------------------------------

    def prepare_args(self, args: TrainingArguments) -> TrainingArguments:
        """Return the arguments to train with, called in order; ``args`` is a copy that may be changed."""
        return args

    def prepare_dataset(self, dataset: Any) -> Any:
        """Return the training set to use, for example a pruned one; called in order when training starts."""
        return dataset

    def inspect_dataset(self, dataset: Any) -> None:
        """Inspect the training set after every technique has prepared it, with all its columns."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model to train, changed or replaced; called in order before the optimizer exists."""
        return model

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return rules for one parameter in the optimizer; an empty mapping changes nothing.

        ``lr`` and ``weight_decay`` are factors; those of several techniques multiply.  ``group`` names a parameter
        group; names of several techniques join.
        """
        return {}

    def loss_head(self, head: Head) -> Head:
        """Return a head that computes the losses of items from the model's outputs; called in order.

        Its losses replace the model's own loss.
        """
        return head

    # At every step --------------------------------------------------------------------------------------------------

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Return the step batch to train on, for example a truncated one; called in order, before items are counted."""
        return batch

    def loss_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """Return the weights of a micro-batch: of examples, shape (B,), or of items, shape (B, L); None for 1.

        Weights of items have the shape of ``losses.losses_BL``.  The weights of several techniques multiply.
        """

    def extra_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """Return a term to add to the loss, as a sum over the micro-batch's items, or None.

        The terms of several techniques add up.
        """

    def observe(self, ids_B: Tensor, losses_B: Tensor) -> None:
        """Receive the mean loss of each trained example, on the CPU, with the same values on every rank.

        The call comes before the next epoch is planned and before a checkpoint is written, at the latest.
        """

    def accept_step(self, grad_norm: Tensor | float) -> bool:
        """Return whether to make the update, given the gradient norm before clipping; one False skips it."""
        return True

    # Around evaluation and saving -----------------------------------------------------------------------------------

    def for_inference(self, model: nn.Module) -> AbstractContextManager:
        """Return a context in which the model is as users receive it; contexts of several techniques nest in order.

        It surrounds every evaluation and every save of the final model.
        """
        return nullcontext()

    # In every checkpoint --------------------------------------------------------------------------------------------

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        """Return the state for a checkpoint: the counters, and any state that a subclass adds.

        ``global`` state is the same on every rank; ``rank`` state belongs to this rank only.  Omit state that a run
        can recompute from its progress.
        """
        return {name: getattr(self, f"{name}_") for name in self._counters(scope)}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        """Restore the result of `state_dict` for the same scope; called after ``on_train_begin``."""
        for name in self._counters(scope):
            setattr(self, f"{name}_", _restored(state[name], getattr(self, f"{name}_", None)))

    def _counters(self, scope: Literal["global", "rank"]) -> tuple[str, ...]:
        return self.counters if scope == "global" else self.rank_counters

    # For the receipt; a plain Trainer does not call these ----------------------------------------------------------

    def flops_key(self) -> Hashable:
        """Return a key for the technique's changes to this step's computation, such as the number of dropped blocks.

        Shapes and ``requires_grad`` need no key.  Operations are counted once for all steps with equal keys.
        """
        return None

    def report(self) -> Mapping[str, Any]:
        """Return measures of the technique's work for the receipt, as numbers and strings."""
        return {}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Return whether the report of a finished run shows the intended effect; the contract checks it."""
        return True

    # Slots ----------------------------------------------------------------------------------------------------------

    def budget(self) -> Limits:
        """Return the limits of the run; the first one reached ends it."""
        raise NotImplementedError

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return the examples that an epoch trains on: ids_N, and weights_N or None for weights of 1.

        Ids are int64 and ascending, and distinct unless drawn with replacement.  (seed, epoch) seeds the generator.
        """
        raise NotImplementedError

    def order(self, ids_N: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return the ids in training order; ``batch_size`` is the nominal number of examples per step."""
        raise NotImplementedError

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """Return the number of upcoming examples for the next step, over all ranks; ``batch_size`` is nominal."""
        raise NotImplementedError

    def collate(self, features: Sequence[Mapping[str, Any]], collator: Callable) -> dict[str, Any]:
        """Return one micro-batch from its examples, instead of ``collator(features)``; runs in loader workers."""
        raise NotImplementedError

    def step_select(self, ids_B: Tensor, losses_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the examples of a drawn step batch to train on: ascending positions, and weights or None.

        ``losses_B`` holds the losses of all its examples, over all ranks, before the step.
        """
        raise NotImplementedError

    def needs_step_losses(self) -> bool:
        """Return whether to call `step_select` for the next step; if False, train on the whole step batch.

        Every rank must return the same value.  Asked of the owner of ``step_select``.
        """
        return True

    def objective(self, model: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """Compute the gradient of one step and return its loss.

        ``backward()`` adds the step batch's gradient to ``.grad`` and returns its loss.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer for groups with ``params``, ``names``, ``lr``, ``weight_decay`` and ``group``."""
        raise NotImplementedError

    def schedule(self, progress: float) -> float:
        """Return the factor on the peak learning rate at a progress in [0, 1]."""
        raise NotImplementedError

    def averaging(self) -> dict[str, Tensor] | None:
        """Return averages of this rank's part of the parameters, by name, or None before there are any.

        Use the names and shapes of `hf_accel.weights.local_parameters`.  The trainer evaluates, saves and returns them.
        """
        raise NotImplementedError

    def synchronize(self) -> bool:
        """Return whether to average this step's gradients over ranks."""
        raise NotImplementedError

    # Shared by techniques -------------------------------------------------------------------------------------------

    def progress(self, state: TrainerState) -> float:
        """Return the spent share of the budget, from 0 to 1."""
        if self.run_ is not None:
            return self.run_.clock.progress
        return min(state.global_step / state.max_steps, 1.0)

    @classmethod
    def implemented_hooks(cls) -> frozenset[str]:
        """Return the names of the hooks and slots that this class overrides."""
        return frozenset(name for name in (*HOOKS, *SLOTS) if getattr(cls, name) is not getattr(Technique, name))

    def on_init_end(self, args, state, control, **kwargs):
        self._refuse_plain_trainer()

    def on_train_begin(self, args, state, control, **kwargs):
        self._refuse_plain_trainer()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._refuse_plain_trainer()

    def _refuse_plain_trainer(self) -> None:
        if self.run_ is None and (hooks := self.implemented_hooks()):
            raise ValueError(
                f"{self!r} needs {', '.join(sorted(hooks))}, which a callback of a plain Trainer cannot do. "
                f"Use AccelTrainer(..., techniques=[{type(self).__name__}(...)]) or hf_accel.attach(trainer, [...])."
            )


def _restored(value: Any, present: Any) -> Any:
    """Return a copy of a saved value, on the device of the current one."""
    if isinstance(value, Tensor):
        return value.clone().to(present.device) if isinstance(present, Tensor) else value.clone()
    return copy.deepcopy(value)


def check_claims(techniques: Sequence[Technique]) -> None:
    """Raise ValueError if two techniques share a claim."""
    for i, later in enumerate(techniques):
        for earlier in techniques[:i]:
            for claim in sorted(earlier.claims & later.claims):
                raise ValueError(
                    f"techniques: {earlier!r} and {later!r} both claim {CLAIMS.get(claim, claim)}. "
                    "Remove one of the two."
                )
