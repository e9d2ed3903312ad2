"""Find the owners of slots and the implementers of hooks among the techniques of a run."""

from __future__ import annotations

from collections.abc import Sequence

from hf_accel.technique import HOOKS, SLOTS, STREAM, Technique, check_claims


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
        for found in self.techniques:
            if not isinstance(found, Technique):
                raise ValueError(
                    f"techniques: {found!r} is not an instance of a technique. Pass instances, such as LengthGrouped()."
                )
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
