"""The one abstraction: a technique is a ``TrainerCallback`` with a few hooks that a callback lacks.

Timing stays with the events of ``transformers.TrainerCallback``.  What a callback cannot say is said in *hooks*
(several techniques may answer; the rule of combination is part of the hook) and in *slots* (at most one technique
owns each).  A technique owns a slot by overriding its method; nothing is registered anywhere.

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

from hf_accel.bounds import check_bounds

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch
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
"""What at most one technique may decide; each is a method of `Technique`."""

HOOKS = (
    "prepare_args",
    "prepare_dataset",
    "inspect_dataset",
    "prepare_model",
    "parameter_rules",
    "loss_head",
    "transform_batch",
    "example_weights",
    "token_weights",
    "extra_loss",
    "evaluating",
    "saving",
    "observe",
    "accept_step",
)
"""Questions that every technique may answer."""

STREAM = frozenset(
    "prepare_dataset select order batch collate step_select objective loss_head transform_batch "
    "example_weights token_weights extra_loss observe synchronize".split()
)
"""Hooks and slots for which batches come from the `StepStream`."""

CLAIMS = {
    "block_positions": "the positions of blocks, which one of them changes",
    "early_weights": "the weights of early steps, which one of them averages and the other replaces",
    "frozen_blocks": "which blocks are trained, by positions that one of them changes",
    "initial_blocks": "the weights of the first blocks, which one of them writes and the other replaces",
    "initial_weights": "the first weights of the model",
    "layer_types": "the type of the linear layers",
    "logits": "the logits, which one of them reads and the other never computes",
    "own_weights": "the weights of a rank, of which one takes a mean and the other chooses some on each rank",
    "pretrained_weights": "the weights under adapters, which one of them writes and the other never saves",
    "slow_weights": "the weights that are averaged, which one of them replaces by factors",
    "synchronization": "what ranks exchange, which growth would change",
    "weight_matrices": "the form of the weight matrices",
}
"""What techniques may claim, and how an error names it.  A technique of one's own may add others."""

State = Mapping[str, Any]
"""Tensors, numbers, strings, and lists and dicts of these."""


class Diverged(RuntimeError):
    """A technique gives the run up, for update after update was refused."""


@dataclasses.dataclass(eq=False)
class Technique(TrainerCallback):
    """Base class of every technique.

    Subclasses are dataclasses whose fields are their hyperparameters, each with a default.  The constructor stores
    these and nothing else; what a technique learns while training is kept in attributes that end with ``_``, made in
    ``on_train_begin`` (or when the data set is prepared), so that one instance may train twice.
    """

    fidelity: ClassVar[Literal["exact", "unbiased", "lossy"]] = "lossy"
    """``exact``: the same result; ``unbiased``: the same gradient in expectation; ``lossy``: another result."""

    neutral: ClassVar[Mapping[str, Any] | None] = None
    """Hyperparameters under which training is exactly as without the technique; None where there are none."""

    expected_failed_checks: ClassVar[Mapping[str, str]] = {}
    """Checks of the contract that are known to fail, each with its reason."""

    refused_backends: ClassVar[Mapping[str, str]] = {}
    """Distributed backends (``ddp``, ``fsdp2``, ``zero``) on which it raises before the first step, with reasons."""

    variations: ClassVar[Mapping[str, Any]] = {}
    """For fields whose other values cannot be guessed, one that must change the outcome; the contract tries it."""

    modality: ClassVar[Literal["text", "masked text", "replaced text", "image", "speech"]] = "text"
    """What the contract trains it on; ``text`` also where it does not matter."""

    probe_fields: ClassVar[dict[str, Any]] = {}
    """Hyperparameters with which the contract trains it, where the defaults need a rare device or a long run."""

    probe_micro_batch_size: ClassVar[int | None] = None
    """Examples of the micro-batches in which the contract trains it; None: whole steps."""

    claims: ClassVar[frozenset[str]] = frozenset()
    """What at most one technique of a run may touch, beside slots; see `CLAIMS`."""

    decides_by_weights: ClassVar[bool] = False
    """Whether it decides by the weights or gradients of a rank, so that all ranks must hold the same weights."""

    counters: ClassVar[tuple[str, ...]] = ()
    """Attributes that every checkpoint holds, without the trailing ``_``; the same on every rank."""

    rank_counters: ClassVar[tuple[str, ...]] = ()
    """Attributes that every checkpoint holds for each rank, without the trailing ``_``."""

    run_: ClassVar[Any] = None
    """The run that asks the hooks (`hf_accel.run.Run`), set on the instance; None in a plain Trainer."""

    def __post_init__(self) -> None:
        check_bounds(self)

    # Before training ------------------------------------------------------------------------------------------------

    def prepare_args(self, args: TrainingArguments) -> TrainingArguments:
        """Arguments that must differ, on a copy; asked in order."""
        return args

    def prepare_dataset(self, dataset: Any) -> Any:
        """The training set, deduplicated, pruned or scored; asked in order, when training starts."""
        return dataset

    def inspect_dataset(self, dataset: Any) -> None:
        """Read what is needed of the training set, as all techniques have prepared it and with all its columns."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """What replaces the model before the optimizer exists; asked in order."""
        return model

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """How the optimizer treats one parameter: factors ``lr`` and ``weight_decay`` (factors of several techniques
        multiply) and a ``group`` key (keys join).  Empty: no opinion."""
        return {}

    def loss_head(self, head: Head) -> Head:
        """What takes the model's outputs apart into losses of items, instead of ``head``; asked in order.  Its losses
        are then used in the place of the model's own."""
        return head

    # At every step --------------------------------------------------------------------------------------------------

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """The step batch, truncated, resized or mixed; before items are counted; asked in order."""
        return batch

    def example_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """How much each example of a micro-batch counts, (B,); weights of several techniques multiply."""

    def token_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """How much each item counts, shaped as ``losses.losses_BL``; weights of several techniques multiply."""

    def extra_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """A sum over the micro-batch's items that is added to the loss; sums of several techniques add."""

    def observe(self, ids_B: Tensor, losses_B: Tensor) -> None:
        """Mean loss of each example that was trained on, on the CPU, the same on every rank; at the latest before the
        next epoch is planned and before a checkpoint is written."""

    def accept_step(self, grad_norm: Tensor | float) -> bool:
        """Whether the update may happen, given the norm of the gradient before clipping; all must agree."""
        return True

    # Around evaluation and saving -----------------------------------------------------------------------------------

    def evaluating(self, model: nn.Module) -> AbstractContextManager:
        """Around every evaluation; nested."""
        return nullcontext()

    def saving(self, model: nn.Module) -> AbstractContextManager:
        """Around every saving of the final model; nested."""
        return nullcontext()

    # In every checkpoint --------------------------------------------------------------------------------------------

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        """What progress cannot recompute: the counters, and what a technique adds to them.  ``global``: the same on
        every rank, ``rank``: of this rank only."""
        return {name: getattr(self, f"{name}_") for name in self._counters(scope)}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        """Restore what `state_dict` gave for the same scope; called after ``on_train_begin``."""
        for name in self._counters(scope):
            setattr(self, f"{name}_", _restored(state[name], getattr(self, f"{name}_", None)))

    def _counters(self, scope: Literal["global", "rank"]) -> tuple[str, ...]:
        return self.counters if scope == "global" else self.rank_counters

    # For the receipt; a plain Trainer has no use for these, and no need of them ------------------------------------

    def flops_key(self) -> Hashable:
        """What it varies of the computation of this step, beyond shapes and ``requires_grad``: the number of blocks or
        tokens that are dropped.  Steps that are alike in it are counted once."""
        return None

    def report(self) -> Mapping[str, Any]:
        """What it did, as numbers and strings, for the receipt."""
        return {}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Whether the report of a finished run shows what the technique is for; the contract checks it."""
        return True

    # Slots ----------------------------------------------------------------------------------------------------------

    def budget(self) -> Mapping[str, float]:
        """What may be spent, per unit of `hf_accel.clock.UNITS`; the first one reached ends the run."""
        raise NotImplementedError

    def extends_previous_run(self) -> bool:
        """Whether the owner of ``budget`` means what may be spent beyond what the run before it has spent."""
        return False

    def meters(self) -> Mapping[str, Any]:
        """What measures, for the owner of ``budget``, what the trainer cannot count: of ``flops`` something with
        `hf_accel.meters.flops.FlopMeter.measure`, of ``joules`` a function that gives those of this rank until now, and
        of ``seconds``, where they count from another moment than the entry into ``train()``, those since then."""
        return {}

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Which examples an epoch trains on and with which weights: ids_N (int64, ascending, distinct unless drawn
        with replacement) and weights_N or None.  The generator is seeded by (seed, epoch)."""
        raise NotImplementedError

    def order(self, ids_N: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """The ids in the order of training; ``batch_size`` is the nominal number of examples a step."""
        raise NotImplementedError

    def batch(self, upcoming_ids_N: Tensor, batch_size: int) -> int:
        """How many of the upcoming examples the next step takes, over all ranks; ``batch_size`` is nominal."""
        raise NotImplementedError

    def collate(self, features: Sequence[Mapping[str, Any]], collator: Callable) -> dict[str, Any]:
        """One micro-batch from its examples, instead of ``collator(features)``; runs in loader workers."""
        raise NotImplementedError

    def step_select(self, ids_B: Tensor, losses_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which examples of a drawn step batch are trained on: positions (ascending) and weights or None; given the
        losses of all of them, over all ranks, before the step."""
        raise NotImplementedError

    def needs_step_losses(self) -> bool:
        """Whether the owner of ``step_select`` wants the losses of the next step; where not, all of it is trained on.
        The same on every rank."""
        return True

    def objective(self, model: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """The gradient of one step; ``backward()`` adds the step batch's gradient to ``.grad`` and gives its loss."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer, from groups with ``params``, ``names``, ``lr``, ``weight_decay`` and ``group``."""
        raise NotImplementedError

    def schedule(self, progress: float) -> float:
        """The factor on the peak learning rate, at progress in [0, 1]."""
        raise NotImplementedError

    def averaging(self) -> dict[str, Tensor] | None:
        """Averages of this rank's part of the parameters (`hf_accel.weights.local_parameters`), by name; None while
        there are none.  The trainer evaluates, saves and returns them."""
        raise NotImplementedError

    def synchronize(self) -> bool:
        """Whether this step's gradients are averaged over ranks."""
        raise NotImplementedError

    # What techniques share ------------------------------------------------------------------------------------------

    def progress(self, state: TrainerState) -> float:
        """Share of the budget that is spent, from 0 to 1."""
        if self.run_ is not None:
            return self.run_.clock.progress
        return min(state.global_step / state.max_steps, 1.0)

    @classmethod
    def implemented_hooks(cls) -> frozenset[str]:
        """Names of the hooks and slots that this class overrides."""
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
    """A copy of a saved value, on the device of the present one."""
    if isinstance(value, Tensor):
        return value.clone().to(present.device) if isinstance(present, Tensor) else value.clone()
    return copy.deepcopy(value)


def check_claims(techniques: Sequence[Technique]) -> None:
    """Raise ValueError where two techniques claim the same."""
    for i, later in enumerate(techniques):
        for earlier in techniques[:i]:
            for claim in sorted(earlier.claims & later.claims):
                raise ValueError(
                    f"techniques: {earlier!r} and {later!r} both claim {CLAIMS.get(claim, claim)}. "
                    "Remove one of the two."
                )
