"""Choose a few lists of techniques that cover every pair."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations, permutations


def covering_array(
    owners_by_slot: Mapping[str, Collection[str]],
    free_techniques: Collection[str],
    seed: int = 0,
    *,
    relations: Callable[[str, str], Collection[str]] = lambda a, b: ("before", "without"),
    given: Sequence[Sequence[str]] = (),
) -> list[list[str]]:
    """Return a few runs, each an ordered list of techniques, that cover the relations of every pair.

    No run has two owners of a slot.  The greedy search keeps the random run that shows the most new relations.

    Args:
        owners_by_slot: Owners of each slot, which cannot share a run.
        free_techniques: All other techniques.
        seed: Seed of the random runs.
        relations: Return the relations to show of an ordered pair that can share a run: ``with``, ``before``,
            ``without``.
        given: Runs that exist already; the result need not repeat their relations.
    """
    names = sorted({*free_techniques, *(name for owners in owners_by_slot.values() for name in owners)})
    clashes = {frozenset(pair) for owners in owners_by_slot.values() for pair in combinations(owners, 2)}
    generator = random.Random(seed)

    def candidate() -> list[str]:
        share, run = generator.uniform(0.5, 1), []
        for name in generator.sample(names, len(names)):
            if generator.random() < share and not any(frozenset((name, other)) in clashes for other in run):
                run.append(name)
        return run

    missing = {
        (a, relation, b)
        for a, b in permutations(names, 2)
        for relation in relations(a, b)
        if relation == "without" or frozenset((a, b)) not in clashes
    }
    missing -= relations_shown(given, names)
    runs = []
    while missing:
        run = max((candidate() for _ in range(200)), key=lambda run: len(relations_shown([run], names) & missing))
        if news := relations_shown([run], names) & missing:
            missing -= news
            runs.append(run)
    return runs


def relations_shown(runs: Sequence[Sequence[str]], names: Collection[str]) -> set[tuple[str, str, str]]:
    """Return the relations of pairs of names in the runs.

    Names are together (``with``, both ways), in an order (``before``), or one ``without`` the other.
    """
    shown = set()
    for run in runs:
        for a, b in combinations(run, 2):
            shown |= {(a, "before", b), (a, "with", b), (b, "with", a)}
        shown |= {(a, "without", b) for a in run for b in names if b not in run}
    return shown
