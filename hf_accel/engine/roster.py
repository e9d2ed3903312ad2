"""Find the owners of slots and the implementers of hooks among the techniques of a run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from hf_accel.technique import HOOKS, SLOTS, STREAM, Technique, check_claims

EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


class Roster:
    """The techniques of a trainer, fixed from its construction.

    Attributes:
        techniques: Techniques, in the order in which they are asked.
        names: Unique name of each technique.
        answered: Names of the hooks and slots that some technique overrides.
        streamed: True if batches come from the `StepStream`.
        paced: True if Trainer's notion of time follows the clock.
    """

    def __init__(self, techniques: Sequence[Technique], *, streamed: bool = False, paced: bool = False):
        self.techniques = list(techniques)
        for technique in self.techniques:
            check_instance(technique)
        self.names = [f"{i}.{type(technique).__name__}" for i, technique in enumerate(self.techniques)]
        self._owners = {slot: self._find_owner(slot) for slot in SLOTS}
        check_claims(self.techniques)
        self._by_hook = {hook: [t for t in self.techniques if hook in t.implemented_hooks()] for hook in HOOKS}
        self.answered = frozenset(name for t in self.techniques for name in t.implemented_hooks())
        self.streamed = streamed or bool(self.answered & STREAM)
        timed = self._owners["budget"] is not None or self._owners["schedule"] is not None
        self.paced = paced or self.streamed or timed

    def _find_owner(self, slot: str) -> Technique | None:
        owners = [t for t in self.techniques if slot in t.implemented_hooks()]
        if len(owners) > 1:
            raise ValueError(f"techniques: {' and '.join(map(repr, owners))} both own the slot {slot!r}. Keep one.")
        return owners[0] if owners else None

    def owner(self, slot: str) -> Technique | None:
        """Return the technique that owns a slot, or None."""
        return self._owners[slot]

    def with_hook(self, hook: str) -> list[Technique]:
        """Return the techniques that implement a hook, in order."""
        return self._by_hook[hook]

    def name_of(self, technique: Technique) -> str:
        """Return the name that a technique's time is charged to."""
        return self.names[self.techniques.index(technique)]


def check_instance(technique: Any) -> None:
    """Raise ValueError unless it is an instance of a technique that overrides something and declares it well."""
    if not isinstance(technique, Technique):
        meant = f"{technique.__name__}()" if isinstance(technique, type) else "Name()"
        raise ValueError(f"techniques: {technique!r} is not an instance of a technique. Pass one, such as {meant}.")
    kind = type(technique)
    name = kind.__name__
    known = (*EVENTS, *HOOKS, *SLOTS)
    if all(getattr(kind, method) is getattr(Technique, method) for method in known):
        others = [method for method in dir(kind) if not method.startswith("_") and not hasattr(Technique, method)]
        meant = [
            (method, close) for method in others for close in difflib.get_close_matches(method, known, n=1, cutoff=0.8)
        ]
        advice = "Did you mean {1!r} by {0!r}?".format(*meant[0]) if meant else "Override one."
        raise ValueError(f"{name} overrides no event, hook or slot. {advice}")
    if not isinstance(kind.claims, frozenset):
        raise ValueError(f"{name}.claims ({kind.claims!r}) must be a frozenset. Write frozenset({{'logits'}}).")
    for counter in (*kind.counters, *kind.rank_counters):
        if counter.endswith("_"):
            raise ValueError(f"{name}: the counter {counter!r} ends with '_'. Write {counter.rstrip('_')!r}.")
