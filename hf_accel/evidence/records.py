"""The evidence: records of comparisons, and the grade of each technique.

A record is a finished comparison without its logs: the arms, the machine, and the result of each seed.  ``hf-accel
compare --record FILE`` writes one; the records in ``docs/evidence`` are committed and ship with the package.  Grades:

    proven here      an arm of this technique alone gained (`gained`) on the best that Trainer can do (`fair`)
    no gain shown    there are records of this technique alone, but none in which it gained so
    reported         there is no record of it alone; the papers on its card report results

Arms of several techniques grade none of them, because the gain could be anyone's.  Repeated comparisons produce false
positives, so p-values are adjusted for all records in which the technique alone meets a fair baseline.

Questions other than speed at equal quality, such as two schedules over the same steps, have scripts in ``benchmarks``.
Their documents may have ``findings``, which cards show: ``technique``, ``workload``, ``text`` and ``gained``.  True or
False counts for the grade as an arm does; None does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hf_accel

Record = dict[str, Any]
Arm = dict[str, Any]
Finding = dict[str, Any]
Records = Mapping[str, Record]
"""Records by name."""
LEVEL = 0.025
"""One-sided significance level equivalent to a 95 % interval."""
FORM = 2
"""Form of the records that comparisons write; those of form 1 have no trials, and placebos not for each arm."""
FREE = {
    "learning_rate": "learning rate",
    "per_device_train_batch_size": "batch size",
    "train_sampling_strategy": "grouping by length",
    "weight_decay": "weight decay",
    "adam_beta2": "beta2",
}
"""Options that Trainer offers for free, which the search of a fair baseline covers."""
OPEN = ("learning_rate", "per_device_train_batch_size")
"""Those of them that a search may leave at the border of what it tried."""
Grade = Literal["proven here", "no gain shown", "reported"]


def folder() -> Path:
    """Return the folder of the committed records, in the installed package or in the checkout."""
    packaged = Path(hf_accel.__file__).with_name("evidence_records")
    return packaged if packaged.is_dir() else Path(hf_accel.__file__).parents[1] / "docs" / "evidence"


def load_records(path: Path | None = None) -> dict[str, Record]:
    """Load a folder's comparisons and findings, by the stem of the file."""
    documents = {file.stem: json.loads(file.read_text()) for file in sorted((path or folder()).glob("*.json"))}
    return {name: document for name, document in documents.items() if document.keys() & {"arms", "findings"}}


def candidates(records: Records) -> Iterator[tuple[str, Record, Arm]]:
    """Yield each candidate, after its record and the name of that."""
    for name, document in records.items():
        for arm in document.get("arms", ()):
            if arm["role"] == "candidate":
                yield name, document, arm


def findings(technique: str, records: Records) -> Iterator[tuple[str, Record, Finding]]:
    """Yield each finding about a technique, after its record and the name of that."""
    for name, document in records.items():
        for finding in document.get("findings", ()):
            if finding["technique"] == technique:
                yield name, document, finding


def techniques_of(arm: Arm) -> list[str]:
    """Return the names of an arm's techniques."""
    return [name for entry in arm["techniques"] for name in entry]


def verdict(document: Record, arm: Arm) -> str:
    """Judge a candidate by its speed-up in the main cost, in a few words."""
    own = arm["speed_ups"].get(document["cost"])
    if own is None:
        return "not measured"
    if own["kind"] == "miss":
        return "miss"
    if own["low"] <= 1:
        return "slower" if own["high"] is not None and own["high"] < 1 else "no gain shown"
    if rivals(document, arm):
        return "no gain over its placebo"
    if by_chance(arm):
        return "no gain beyond chance"
    if not placebos(document, arm):
        return "without placebos"
    return "not all placebos run" if unmeasured(document, arm) else "faster"


def gained(document: Record, arm: Arm) -> bool:
    """Tell whether an arm was faster at equal quality, beyond chance and beyond its placebos.

    The 95 % interval of its speed-up lies above 1, or the lower end of a bound does, also with p adjusted for the
    number of candidates.  The arm has placebos, all of them ran, and none has an interval that reaches up to the arm's
    value.
    """
    return verdict(document, arm) == "faster"


def fair(document: Record) -> bool:
    """Tell whether a record's baseline is the best that Trainer can do.

    Its search varied all options that Trainer offers for free, and passed the best learning rate and batch size.
    """
    return bool(document["tuned"]) and not untried(document) and not at_border(document)


def untried(document: Record) -> list[str]:
    """Name the free options of Trainer that the search of the baseline did not vary."""
    trials = document.get("trials", {}).get("baseline", [])
    return [label for name, label in FREE.items() if len({trial.get(name) for trial in trials}) < 2]


def at_border(document: Record) -> list[str]:
    """Name the open options in which the baseline has the lowest or the highest value that its search tried."""
    trials = document.get("trials", {}).get("baseline", [])
    found = []
    for name in OPEN:
        values = {trial[name] for trial in trials if name in trial}
        own = document.get("baseline_args", {}).get(name)
        ended = len(values) > 1 and own in (min(values), max(values))
        if ended and (name, own) != ("per_device_train_batch_size", 1):  # a batch ends there
            found.append(FREE[name])
    return found


def by_chance(arm: Arm) -> bool:
    """Tell whether p, adjusted for the number of candidates, is too large."""
    return arm["p_value"] is not None and arm["p_value"] > LEVEL


def rivals(document: Record, arm: Arm) -> list[str]:
    """Name the arm's placebos that may be as fast: their interval reaches up to the arm's value."""
    own = arm["speed_ups"].get(document["cost"], {"value": 0.0})
    found = []
    for other in placebos(document, arm):
        theirs = other["speed_ups"].get(document["cost"], {"kind": "miss"})
        if theirs["kind"] != "miss" and (theirs["high"] is None or theirs["high"] >= own["value"]):
            found.append(other["name"])
    return found


def unmeasured(document: Record, arm: Arm) -> list[str]:
    """Name the arm's placebos that did not run because the time was up."""
    return [other["name"] for other in placebos(document, arm) if document["cost"] not in other["speed_ups"]]


def placebos(document: Record, arm: Arm) -> list[Arm]:
    """Return an arm's placebos."""
    return [other for other in document["arms"] if other["role"] == "placebo" and other["of"] == arm["name"]]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, so that the chance of any false positive stays below the level.

    Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(largest, 1.0)
    return adjusted


def grade(technique: str, records: Records) -> Grade:
    """Grade a technique by the records."""
    alone = [(document, arm) for _, document, arm in candidates(records) if techniques_of(arm) == [technique]]
    found = [f["gained"] for _, _, f in findings(technique, records) if f["gained"] is not None]
    tuned = [(document, arm) for document, arm in alone if fair(document)]
    p_values = holm([1.0 if arm["p_unadjusted"] is None else arm["p_unadjusted"] for _, arm in tuned])
    if any(found) or any(
        gained(document, arm) and p_value <= LEVEL for (document, arm), p_value in zip(tuned, p_values, strict=True)
    ):
        return "proven here"
    return "no gain shown" if alone or found else "reported"


def cost_label(cost: str) -> str:
    """Return a cost's name for people."""
    return {"cpu_seconds": "CPU seconds", "wall_seconds": "wall seconds", "flops": "FLOPs"}.get(cost, cost)


def sentence(document: Record, arm: Arm) -> str:
    """Say a candidate's result in a sentence."""
    name, metric, label = arm["name"], document["metric"].removeprefix("eval_"), cost_label(document["cost"])
    own, found = arm["speed_ups"].get(document["cost"]), verdict(document, arm)
    if own is None:
        return f"{name}: {label} were not measured."
    if found == "miss":
        of = f"{own['misses']} of {len(own['per_seed'])} seeds"
        return f"{name}: miss. {of} ended worse than the baseline's shortest run, or failed."
    if found == "slower":
        return f"{name} is slower: {own['text']} at equal {metric}."
    if found == "no gain shown":
        return f"{name}: no gain shown, {own['text']} at equal {metric}."
    faster = f"{own['text']} {'faster' if 'seconds' in document['cost'] else f'cheaper in {label}'}"
    gain = f"{name} reaches the baseline's {metric} {faster}"
    if own["kind"] == "bound":
        gain = f"{name} ends with a better {metric} than the baseline's longest run, and is {faster}"
    if found == "faster":
        return f"{gain}."
    doubt = {
        "without placebos": "but it was compared with no placebos",
        "no gain over its placebo": f"but a placebo may be as fast ({', '.join(rivals(document, arm))})",
        "no gain beyond chance": f"which among so many candidates may be chance (p = {arm['p_value'] or 0:.2g})",
        "not all placebos run": f"but not all of its placebos were run (not {', '.join(unmeasured(document, arm))})",
    }
    return f"{gain}, {doubt[found]}: no gain shown."


def speed_up(document: Record, arm: Arm) -> str:
    """Return an arm's speed-up in the main cost, with its interval."""
    return arm["speed_ups"].get(document["cost"], {"text": "not measured"})["text"]


def over_defaults(arm: Arm) -> str:
    """Return an arm's speed-up over Trainer's defaults; empty if it was not measured."""
    found = arm.get("over_defaults")
    return found["text"] if found else ""
