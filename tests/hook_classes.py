"""One technique for each class of hooks, for tests that take too long to try all."""

from transformers import TrainerCallback

from hf_accel.recipe import known_techniques
from hf_accel.technique import Technique

EVENTS = [
    name
    for name in dir(TrainerCallback)
    if name.startswith("on_") and name not in ("on_init_end", "on_train_begin")  # in which most do no more than begin
]


def hooks_of(kind):
    """Hooks, slots and events that a technique answers to."""
    events = (event for event in EVENTS if getattr(kind, event) is not getattr(Technique, event))
    return kind.implemented_hooks() | {*events}


def one_of_each_class(kinds=None, first=0):
    """Of the techniques that answer to the same hooks and modality, one; ``first`` says at which to begin."""
    kinds = known_techniques() if kinds is None else kinds
    names = [*kinds][first:] + [*kinds][:first]
    chosen = {}
    for name in names:
        chosen.setdefault((hooks_of(kinds[name]), kinds[name].modality), name)
    return [name for name in kinds if name in chosen.values()]


def one_for_each_hook(kinds, first=0):
    """Few techniques that answer to all hooks together; ``first`` says at which to begin."""
    names = [*kinds][first:] + [*kinds][:first]
    missing, chosen = {hook for kind in kinds.values() for hook in hooks_of(kind)}, []
    while missing:
        best = max(names, key=lambda name: len(hooks_of(kinds[name]) & missing))
        chosen.append(best)
        missing -= hooks_of(kinds[best])
    return [name for name in kinds if name in chosen]
