"""Whether find_lr proposes a learning rate as good as the best of a grid of whole runs, at less than the grid's cost.

    python benchmarks/find_lr.py sst2 novels-lm [--data FOLDER] [--seed 1001] [--share 3] [--out FILE]

Of each workload, the search runs once, told nothing of the tuned learning rate: it is given 1e-3.  Then whole runs are
made, with the arguments of the tuned baseline and one seed: at the proposal, and at a grid around the tuned rate.  The
rates of the record of the tuning that have the same arguments and seed are a part of the grid; they are not run again.
Costs are CPU seconds of one thread.  Searches and runs that were made before are taken from the folder of records.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from hf_accel.cli.find_lr import of_workload
from hf_accel.compare import build_workload, cache
from hf_accel.compare.cache import machine
from hf_accel.compare.pool import run_jobs
from hf_accel.compare.tuning import SEED
from hf_accel.compare.workloads.workload import DATA_ROOT, TUNED
from hf_accel.optim import find_lr
from hf_accel.recipe import Recipe
from hf_accel.updates.learning_rates import at_whole_horizon, best, index_of, rate_at

GIVEN = 1e-3
AROUND = (-1,)
"""Places of the lattice around the tuned rate at which whole runs are made, if there is no record of them."""


def searched(name: str, seed: int, share: float, folder: Path) -> dict:
    """What a search finds, and its CPU seconds."""
    path = folder / f"search-{name}-{seed}-{share:g}.json"
    if not path.exists():
        recipe = Recipe(args={"seed": seed, "learning_rate": GIVEN})
        trainer = of_workload(name, recipe, str(folder / "scratch"))
        began = time.process_time()
        found = find_lr(trainer, share=share, follow=lambda line: print(name, line, flush=True))
        document = found.to_dict() | {"cpu_seconds": time.process_time() - began}
        found.plot(path.with_suffix(".png"))
        path.write_text(json.dumps(document, indent=1) + "\n")
    document = json.loads(path.read_text())
    last = document["rounds"][-1]
    losses = {index_of(float(rate)): loss for rate, loss in last["losses"].items() if loss is not None}
    # What is proposed for the horizon is said anew, for a search that was kept.
    return document | {"learning_rate": rate_at(at_whole_horizon(best(losses), last["share"]))}


def recorded(name: str, args: dict, seed: int) -> dict[float, float]:
    """Losses of the tuning, by learning rate, of whole runs with these arguments and this seed."""
    record = json.loads((TUNED / f"{name}.json").read_text())
    if seed != SEED or record["versions"] != cache.versions():
        return {}
    own = {key: args[key] for key in record["args"] if key != "learning_rate"}
    return {
        trial["learning_rate"]: trial["loss"]
        for trial in record["trials"]
        if trial.get("horizon", 1.0) == 1.0 and {key: trial.get(key) for key in own} == own
    }


def trained(name: str, args: dict, seed: int, rates: list[float], folder: Path) -> dict[float, dict]:
    """Loss and CPU seconds of whole runs, by learning rate."""
    workload = build_workload(name)
    found, jobs = {}, []
    for rate in rates:
        run = {
            "workload": name,
            "options": {"scale": "cpu"},
            "recipe": {"args": args | {"learning_rate": rate}},
            "budget": workload.nominal_budget(),
            "seed": seed,
        }
        record = folder / f"run-{name}-{seed}-{rate:g}.json"
        found[rate] = record
        if cache.load(record) is None:
            jobs.append({"run": run, "record": str(record), "log": str(record.with_suffix(".log"))})
    if jobs:
        run_jobs(jobs, 1, True, lambda job, status: print(name, Path(job["record"]).name, status, flush=True), folder)
    documents = {rate: json.loads(record.read_text()) for rate, record in found.items()}
    return {
        rate: {"loss": document["metrics"]["eval_loss"], "cpu_seconds": document["costs"]["cpu_seconds"]}
        for rate, document in documents.items()
    }


def shown(name: str, seed: int, share: float, folder: Path) -> dict:
    """The record of one workload."""
    workload = build_workload(name)
    args = workload.baseline_args()
    search = searched(name, seed, share, folder)
    proposed, tuned = search["learning_rate"], args["learning_rate"]
    grid = recorded(name, args, seed)
    missing = [rate for rate in (rate_at(index_of(tuned) + move) for move in AROUND) if not near(rate, grid)]
    runs = trained(name, args, seed, sorted({proposed, *missing}), folder)
    losses = grid | {rate: run["loss"] for rate, run in runs.items() if rate in missing}
    winner = min(losses, key=losses.__getitem__)
    seconds = runs[proposed]["cpu_seconds"]
    return {
        "proposed": proposed,
        "loss": runs[proposed]["loss"],
        "best_of_grid": winner,
        "loss_of_best": losses[winner],
        "difference": runs[proposed]["loss"] - losses[winner],
        "margin": workload.margin,
        "within_margin": runs[proposed]["loss"] - losses[winner] <= workload.margin,
        "grid": {f"{rate:g}": losses[rate] for rate in sorted(losses)},
        "cpu_seconds": {"search": search["cpu_seconds"], "run": seconds, "grid": seconds * len(losses)},
        "search": search,
    }


def finding(name: str, found: dict) -> dict:
    """What a card says of a workload."""
    seconds = found["cpu_seconds"]
    return {
        "technique": "LearningRateSearch",
        "workload": name,
        "text": f"`find_lr` proposed {found['proposed']:g}, and a whole run at it ended {found['difference']:.4f} "
        f"above the best of a grid of {len(found['grid'])} ({found['best_of_grid']:g}; margin {found['margin']:.4f}), "
        f"for {seconds['search']:.0f} CPU seconds where the grid takes {seconds['grid']:.0f}",
        "gained": None,
    }


def near(rate: float, rates: dict[float, float]) -> bool:
    return any(abs(index_of(other) - index_of(rate)) == 0 for other in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--share", type=float, default=3.0)
    parser.add_argument("--records", type=Path, default=Path("accel_output/find-lr"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/find-lr.json"))
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    options.records.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "whole runs at the learning rate that find_lr proposes, and at a grid around the tuned one",
        "seeds": [options.seed],
        "share": options.share,
        "given": GIVEN,
        "workloads": {n: shown(n, options.seed, options.share, options.records) for n in options.workloads},
        "machine": machine(),
        "versions": cache.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    record["findings"] = [finding(name, found) for name, found in record["workloads"].items()]
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, found in record["workloads"].items():
        print(name, {key: value for key, value in found.items() if key != "search"})


if __name__ == "__main__":
    main()
