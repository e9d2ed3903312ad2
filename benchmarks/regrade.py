"""Regrades the records of form 1: adds the placebos that `hf_accel.compare.placebos` asks for and that never ran.

    python benchmarks/regrade.py

A record of form 1 says for the whole comparison whether placebos ran.  Now each candidate needs its own, and those that
did not run are listed without seeds, as in a comparison whose time was up.  The speed-up over Trainer's defaults is a
bound, because they ran at one horizon.  Run `docs/generate.py` afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from hf_accel import evidence
from hf_accel.compare.placebos import planned_recipes
from hf_accel.compare.results import dumped, mapped
from hf_accel.compare.statistics import speed_up
from hf_accel.evidence import Arm, Record
from hf_accel.recipe import Recipe


def regraded(document: Record) -> Record:
    """Return a record of form 1 with every placebo that its candidates need."""
    wanted = document.pop("placebos")
    defaults = next((arm for arm in document["arms"] if arm["role"] == "defaults"), None)
    sign = 1 if document["lower_is_better"] else -1
    baseline = Recipe(args=document["baseline_args"])
    for arm in [arm for arm in document["arms"] if arm["role"] == "candidate"]:
        if defaults is not None:
            curve = [[cost] for cost in defaults["paid"]], [[sign * quality] for quality in defaults["qualities"]]
            found = speed_up(*curve, arm["paid"], [sign * quality for quality in arm["qualities"]])
            arm["over_defaults"] = rounded({**dataclasses.asdict(found), "text": str(found)})
        arms = [other for other in document["arms"] if other["of"] == arm["name"]]
        candidate = Recipe(args=baseline.args | arm["args"], techniques=arm["techniques"])
        for label, recipe in planned_recipes(candidate, baseline).items() if wanted else ():
            changed = {name: value for name, value in recipe.args.items() if value != baseline.args.get(name)}
            if not any(other["role"] == "placebo" and other["args"] == changed for other in arms):
                document["arms"].append(missing(f"baseline, {label} of {arm['name']}", changed, arm))
    return document


def rounded(document: dict) -> dict:
    """Return plain data with numbers of six digits; those that are not finite become None."""
    return mapped(document, lambda number: float(f"{number:.6g}") if math.isfinite(number) else None)


def missing(name: str, args: dict, arm: Arm) -> Arm:
    """Return a placebo that did not run."""
    empty = {
        key: [] if isinstance(value, list) else {} if isinstance(value, dict) else None for key, value in arm.items()
    }
    return empty | {"name": name, "role": "placebo", "of": arm["name"], "horizon": arm["horizon"], "args": args}


def main() -> None:
    for path in sorted(evidence.folder().glob("*.json")):
        document = json.loads(path.read_text())
        if "arms" in document and document.get("form", 1) < evidence.FORM and "placebos" in document:
            document = regraded(document)
            Path(path).write_text(dumped(document))
        if "arms" in document:
            for arm in document["arms"]:
                if arm["role"] == "candidate":
                    print(f"{path.stem}: {arm['name']}: {evidence.verdict(document, arm)}")


if __name__ == "__main__":
    main()
