"""What the parts of the trainer share: the techniques, who answers what, and the run's clock, stream and stopwatch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_accel.batch import MicroBatch
from hf_accel.clock import Clock
from hf_accel.losses import Head
from hf_accel.receipt import Receipt, Stopwatch
from hf_accel.recipe import Recipe
from hf_accel.stream.indexed import StepStream
from hf_accel.technique import HOOKS, SLOTS, STREAM, Technique, check_claims

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object  # the parts are mixed into any Trainer


class Hosting(Host):
    """Knows the techniques; the other parts ask them."""

    # Trainer declares these as optional, or as too wide, for what they are while it trains.
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    recipe: Recipe
    techniques: list[Technique]
    allow_changes: bool
    async_checkpoints: bool
    requested_micro_batch_size: int | Literal["auto"] | None
    micro_batch_size: int
    nominal_batch_size: int
    accumulation_steps: int
    run_id: str
    _explicit_args: dict[str, Any]
    _trained_positions: int
    evaluation_seconds: float
    saving_seconds: float
    nominal_steps: int | None
    steps_per_epoch: int
    clock: Clock
    meters: Mapping[str, Any]
    continuation_point: Sequence[float] | None
    """Of a run that goes on with another one: the progress and the share of the peak learning rate at its beginning."""
    learning_rate_factor: Callable[[float], float] | None
    """The factor on the peak learning rate at a progress, where the schedule follows the clock."""
    stream: StepStream | None
    head: Head | None
    receipt: Receipt | None
    stopwatch: Stopwatch
    step_states: list[Any]

    def _host(self, techniques, micro_batch_size, allow_changes, example_loss_func) -> None:
        """Take the techniques in, and find out who answers what."""
        self.techniques: list[Technique] = list(techniques)
        self.allow_changes = allow_changes
        self.example_loss_func = example_loss_func
        self.requested_micro_batch_size = micro_batch_size
        for technique in self.techniques:
            technique.run_ = self  # type: ignore[misc]
        self.technique_names = [f"{i}.{type(t).__name__}" for i, t in enumerate(self.techniques)]
        self._owners = {slot: self._find_owner(slot) for slot in SLOTS}
        check_claims(self.techniques)
        self._askable = {hook: [t for t in self.techniques if hook in t.implemented_hooks()] for hook in HOOKS}
        self._answered = frozenset(name for t in self.techniques for name in t.implemented_hooks())
        self.streamed = bool(self._answered & STREAM) or micro_batch_size is not None
        self.paced = self.streamed or self._owners["budget"] is not None or self._owners["schedule"] is not None
        self.clock = Clock({})
        self.stream = None
        self.meters = {}
        self.continuation_point = None
        self.learning_rate_factor = None
        self._flops_of_step = (0.0, 0.0)
        self._flops_by_size: dict[tuple[int, int], float] = {}
        self._joules_read = 0.0
        self._tokens_before: Tensor | int = 0
        self._tokens_of_step: Tensor | int = 0
        self._observed: list[tuple[Tensor, Tensor]] = []
        self.receipt = None
        self.stopwatch = Stopwatch()
        self._resumed: dict[str, Any] | None = None
        self.searched_hyperparameters: dict[str, Any] = {}
        self.micro_batch: MicroBatch | None = None
        self._swapped = self._ended = False
        self._made_optimizer = False
        self._parts: Any = None
        self._writing: Any = None

    def _find_owner(self, slot: str) -> Technique | None:
        owners = [t for t in self.techniques if slot in t.implemented_hooks()]
        if len(owners) > 1:
            raise ValueError(f"techniques: {' and '.join(map(repr, owners))} both own the slot {slot!r}. Keep one.")
        return owners[0] if owners else None

    def owner(self, slot: str) -> Technique | None:
        """The technique that owns a slot."""
        return self._owners[slot]

    def with_hook(self, hook: str) -> list[Technique]:
        """The techniques that answer a hook, in order."""
        return self._askable[hook]

    def charge(self, technique: Technique) -> contextlib.AbstractContextManager:
        """Charge what happens inside to a technique."""
        return self.stopwatch.charge(self.technique_names[self.techniques.index(technique)])

    def _share(self, values: list[float]) -> list[float]:
        """The values of rank 0, on every rank."""
        if self.args.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0, group=self._cpu_group)
        return shared.tolist()

    @functools.cached_property
    def _cpu_group(self) -> Any:
        """A group whose messages do not wait for the accelerator."""
        return torch.distributed.new_group(backend="gloo")
