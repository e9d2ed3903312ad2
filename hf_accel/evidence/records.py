"""What comparisons have shown: their records, and the grade of each technique.

A record is a finished comparison without its logs: who was compared with what, on which machine, and what came out for
each seed.  ``hf-accel compare --record FILE`` writes one; those in ``docs/evidence`` are committed and come with the
package.  A technique's grade is

    proven here      in some record with placebos, an arm of this technique alone gained (`gained`) on a tuned baseline
    no gain shown    there are records of this technique alone, and none is such
    reported         there is no such record; the papers on its card say what others saw

Arms of several techniques grade none of them, as nobody knows whose the gain is.  Who compares a technique often enough
finds it faster some time, so p is adjusted for all arms of it alone on tuned baselines, over all records.

What is no question of speed at equal quality (two schedules over the same steps, say) is measured by a script of
``benchmarks``.  Its document may have ``findings``, which cards show: each with ``technique``, ``workload``, ``text``,
and whether it ``gained`` on a tuned baseline, which counts for the grade as an arm does, or None where it has no say.
"""

from __future__ import annotations

import json
import math
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
"""Where the interval of a single candidate begins at 1, its one-sided p is this."""
Grade = Literal["proven here", "no gain shown", "reported"]


def folder() -> Path:
    """Where the committed records are: in the package where it was installed, else in the checkout."""
    packaged = Path(hf_accel.__file__).with_name("evidence_records")
    return packaged if packaged.is_dir() else Path(hf_accel.__file__).parents[1] / "docs" / "evidence"


def load_records(path: Path | None = None) -> dict[str, Record]:
    """The comparisons and the findings in a folder, by the stem of the file."""
    documents = {file.stem: json.loads(file.read_text()) for file in sorted((path or folder()).glob("*.json"))}
    return {name: document for name, document in documents.items() if document.keys() & {"arms", "findings"}}


def candidates(records: Records) -> Iterator[tuple[str, Record, Arm]]:
    """The name of the record, the record, and the arm, of everything that was to be faster than a baseline."""
    for name, document in records.items():
        for arm in document.get("arms", ()):
            if arm["role"] == "candidate":
                yield name, document, arm


def findings(technique: str, records: Records) -> Iterator[tuple[str, Record, Finding]]:
    """The name of the record, the record, and the finding, of what else was measured of a technique."""
    for name, document in records.items():
        for finding in document.get("findings", ()):
            if finding["technique"] == technique:
                yield name, document, finding


def techniques_of(arm: Arm) -> list[str]:
    """The names of an arm's techniques."""
    return [name for entry in arm["techniques"] for name in entry]


def gained(document: Record, arm: Arm) -> bool:
    """Whether an arm was faster at equal quality, and neither by chance nor just as a placebo of it is.

    The 95 % interval of its speed-up in the main cost lies above 1 (of a bound, its lower end does), also when p is
    adjusted for the number of candidates, all placebos of it were measured, and of none the interval reaches as high
    as the arm's own value.
    """
    own = arm["speed_ups"].get(document["cost"])
    above = own is not None and own["kind"] != "miss" and own["low"] > 1
    return above and not by_chance(arm) and not rivals(document, arm) and not unmeasured(document, arm)


def by_chance(arm: Arm) -> bool:
    """Whether one of so many candidates may look as fast as this without being it."""
    return arm["p_value"] is not None and arm["p_value"] > LEVEL


def rivals(document: Record, arm: Arm) -> list[str]:
    """The placebos of an arm that may be as fast: the upper end of their interval reaches its value."""
    own = arm["speed_ups"].get(document["cost"], {"value": 0.0})
    found = []
    for other in placebos(document, arm):
        theirs = other["speed_ups"].get(document["cost"], {"kind": "miss"})
        if theirs["kind"] != "miss" and (theirs["high"] is None or theirs["high"] >= own["value"]):
            found.append(other["name"])
    return found


def unmeasured(document: Record, arm: Arm) -> list[str]:
    """The placebos of an arm whose cost is not known, as the time was up before they ran."""
    return [other["name"] for other in placebos(document, arm) if document["cost"] not in other["speed_ups"]]


def placebos(document: Record, arm: Arm) -> list[Arm]:
    """The placebos of an arm."""
    return [other for other in document["arms"] if other["role"] == "placebo" and other["of"] == arm["name"]]


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number: who finds one of many below a level finds it by chance no more often.

    Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(largest, 1.0)
    return adjusted


def grade(technique: str, records: Records) -> Grade:
    """What the records say of a technique."""
    alone = [(document, arm) for _, document, arm in candidates(records) if techniques_of(arm) == [technique]]
    found = [f["gained"] for _, _, f in findings(technique, records) if f["gained"] is not None]
    tuned = [(document, arm) for document, arm in alone if document["tuned"]]
    p_values = holm([1.0 if arm["p_unadjusted"] is None else arm["p_unadjusted"] for _, arm in tuned])
    if any(found) or any(
        document["placebos"] and gained(document, arm) and p_value <= LEVEL
        for (document, arm), p_value in zip(tuned, p_values, strict=True)
    ):
        return "proven here"
    return "no gain shown" if alone or found else "reported"


def said(cost: str) -> str:
    """A cost as people call it."""
    return {"cpu_seconds": "CPU seconds", "wall_seconds": "wall seconds", "flops": "FLOPs"}.get(cost, cost)


def sentence(document: Record, arm: Arm) -> str:
    """What came out for a candidate, in words."""
    name, metric = arm["name"], document["metric"].removeprefix("eval_")
    own = arm["speed_ups"].get(document["cost"])
    faster = "faster" if "seconds" in document["cost"] else f"cheaper in {said(document['cost'])}"
    if own is None:
        return f"{name}: nothing is known of its {said(document['cost'])}."
    if own["kind"] == "miss":
        of = f"{own['misses']} of {len(own['per_seed'])} seeds"
        return f"{name}: miss. {of} ended worse than the baseline's shortest run, or failed."
    if own["low"] > 1:
        gain = f"{name} reaches the baseline's {metric} {own['text']} {faster}"
        if own["kind"] == "bound":
            gain = f"{name} ends with a better {metric} than the baseline's longest run, and is {own['text']} {faster}"
        if others := rivals(document, arm):
            return f"{gain}, but a placebo may be as fast ({', '.join(others)}): no gain shown."
        if by_chance(arm):
            return f"{gain}, which among so many candidates may be chance (p = {arm['p_value']:.2g}): no gain shown."
        if others := unmeasured(document, arm):
            return f"{gain}, but not all of its placebos were run (not {', '.join(others)}): no gain shown."
        return f"{gain}." if document["placebos"] else f"{gain}; it was compared with no placebos."
    if own["high"] is not None and own["high"] < 1:
        return f"{name} is slower: {own['text']} at equal {metric}."
    return f"{name}: no gain shown, {own['text']} at equal {metric}."


def speed_up(document: Record, arm: Arm) -> str:
    """An arm's speed-up in the main cost, with its interval."""
    return arm["speed_ups"].get(document["cost"], {"text": "not measured"})["text"]


def verdict(document: Record, arm: Arm) -> str:
    """What came out for a candidate, in a word or three."""
    own = arm["speed_ups"].get(document["cost"])
    if own is None:
        word = "not measured"
    elif own["kind"] == "miss":
        word = "miss"
    elif gained(document, arm):
        word = "faster"
    elif own["low"] > 1 and rivals(document, arm):
        word = "no gain over its placebo"
    elif own["low"] > 1:
        word = "no gain beyond chance" if by_chance(arm) else "not all placebos run"
    else:
        word = "slower" if own["high"] is not None and own["high"] < 1 else "no gain shown"
    return word if document["placebos"] else f"{word}, without placebos"


def rounded(value: Any) -> Any:
    """The same with six digits of every number that is not whole."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
