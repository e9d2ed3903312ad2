"""Caveats: a sentence for each thing that makes the results of a comparison say less."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_accel.evidence.records import FORM, Record, at_border, untried


def caveats(document: Record) -> list[str]:
    """Return the sentences for a record."""
    return [*of_record(document), *of_arms(document)]


def of_record(document: Record) -> Iterator[str]:
    """Yield what concerns every arm."""
    if document.get("form", 1) < FORM:
        yield (
            f"The record has the older form {document.get('form', 1)}: no trials, and placebos not for each arm. "
            "Run the comparison again."
        )
    elif left := untried(document):
        yield f"The search of the baseline did not vary {listed(left)}."
    if names := at_border(document):
        yield f"The search of the baseline ended at its border in {listed(names)}. Give it more trials."
    level = document.get("level")
    reached = [arm["quality"] for arm in document["arms"] if arm["role"] == "baseline" and arm["quality"] is not None]
    if level is not None and reached:
        best = min(reached) if document["lower_is_better"] else max(reached)
        if best > level if document["lower_is_better"] else best < level:
            metric = document["metric"].removeprefix("eval_")
            yield f"The baseline never reaches the workload's {metric} of {level:.4g}: its best is {best:.4g}."


def of_arms(document: Record) -> Iterator[str]:
    """Yield what concerns single arms."""
    for arm in document["arms"]:
        failed = sum(value is None for value in arm["qualities"])
        if failed:
            why = f": {'; '.join(arm['errors'])}" if arm["errors"] else ", without a finite quality."
            yield f"{arm['name']} failed on {failed} of {len(arm['qualities'])} seeds{why}"
        own = arm["speed_ups"].get(document["cost"])
        if arm["role"] != "candidate" or own is None or own["kind"] == "miss" or len(own["per_seed"]) < 2:
            continue
        logs = np.log(own["per_seed"])
        if logs.std(ddof=1) > abs(logs.mean()):
            low, high = min(own["per_seed"]), max(own["per_seed"])
            yield f"{arm['name']}: its seeds differ by more than its effect, from {low:.2f}x to {high:.2f}x."


def listed(words: list[str]) -> str:
    """Join words by commas and "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
