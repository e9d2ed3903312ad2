"""A budgeted run against the best fixed-step run of the same time and against a cosine that the clock cuts off.

    python benchmarks/budget.py novels-lm=60 sst2=10 [--seeds 6] [--data FOLDER] [--out FILE]

All arms have the model, the data, the learning rate and the batches of a workload's tuned baseline, or what was better
by hand for this time (`BY_HAND`), and differ in who says when the run ends:

    budgeted   ``Budget("120s")``, for example: the learning rate follows the time that is spent
    fixed      a plain Trainer with the ``max_steps`` that take this time: found by hand beforehand, by a few runs of
               another seed, as who knows the machine would
    cut off    a plain Trainer whose cosine was planned for twice as many steps (`TOO_MANY`), stopped by the clock

The clock counts CPU seconds of a process, one thread, so that other work on the machine does not count, but for what it
costs in caches: the same number of steps takes some percent more or less.  So always two runs are made at the same
time: the budgeted and the fixed one of a seed, or those of two seeds.  And the loss of a fixed-step run is moved to
the seconds of the budgeted run of the same seed, along the slope of loss against log seconds between the runs of half
the length, of those that were tried by hand, and the mean of the whole ones.
Only the first six seeds are cut off, for it makes more difference than any seed.
Each arm is evaluated after its time.  Runs that were made before are taken from the folder of records, so that a
benchmark can be stopped and go on; a record that is there keeps what is not made anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_accel import AccelTrainer, Budget
from hf_accel.compare import build_workload, cache
from hf_accel.compare.cache import machine
from hf_accel.compare.statistics import non_inferiority
from hf_accel.compare.worker import HARNESS, warm_up
from hf_accel.compare.workloads.workload import DATA_ROOT, Workload

SEEDS = (1001, 1002)
"""Of the runs by which the number of steps is found; none of the comparison."""

CUT_OFF_SEEDS = 6
"""The seeds, from 1 on, of which a cosine is cut off."""

TOO_MANY = 2.0
"""Planned steps of the cosine over those that fit."""

BY_HAND = {("sst2", 120.0): {"learning_rate": 1e-4}}
"""Arguments that all arms have, found by hand where the tuned baseline is for another time: in two minutes sst2 is seen
eight times, and the rate that is best for one pass over it overfits."""


class CutOff(TrainerCallback):
    """Stops a run when its time is over, whatever its learning rate."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.process_time() - self.began >= self.seconds


def trained(workload: Workload, arm: str, seed: int, seconds: float, steps: int | None) -> dict:
    """Train an arm and evaluate it; what it took and how good it is."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    set_seed(seed)
    task = workload.build()
    with tempfile.TemporaryDirectory() as folder:
        args = workload.baseline_args() | HARNESS | {"seed": seed, "output_dir": folder}
        warm_up(task, args)
        if arm == "cut off":
            args["lr_scheduler_type"] = "cosine"
        if steps is not None:
            args["max_steps"] = steps
        arguments = TrainingArguments(**args)
        arguments.dataloader_pin_memory = False
        set_seed(seed)
        if arm == "budgeted":
            trainer: Trainer = AccelTrainer(args=arguments, techniques=[Budget(f"{seconds:g}s")], **task)
            trainer.clock.now = time.process_time
        else:
            trainer = Trainer(args=arguments, callbacks=[CutOff(seconds)] * (arm == "cut off"), **task)
        trainer.pop_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        took = time.process_time() - began
        metrics = trainer.evaluate()
    return {
        "seconds": round(took, 3),
        "steps": trainer.state.global_step,
        "final_learning_rate": trainer.lr_scheduler.get_last_lr()[0],
        "metrics": {name: value for name, value in metrics.items() if name in ("eval_loss", "eval_accuracy")},
    }


def kept(folder: Path, workload: str, arm: str, seed: int, seconds: float, steps: int | None) -> dict:
    """The record of a run, made now if there is none."""
    name = f"{workload}-{arm}-{seed}-{seconds:g}s-{steps or ''}".replace(" ", "_")
    path = folder / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(trained(workload_of(workload, seconds), arm, seed, seconds, steps)) + "\n")
        print(name, path.read_text(), end="", flush=True)
    return json.loads(path.read_text())


def workload_of(name: str, seconds: float) -> Workload:
    """A workload with what was found by hand for so many seconds."""
    workload = build_workload(name)
    workload.args = workload.args | BY_HAND.get((name, seconds), {})
    return workload


def side_by_side(folder: Path, workload: str, seconds: float, runs: list[tuple[str, int, int | None]]) -> list[dict]:
    """The records of runs, of which each is an arm, a seed and a number of steps; made all at once.

    Each in a process that begins anew: in copies of one process, tensors come to lie at the same addresses in all runs
    of an arm, which makes an arm one percent faster or slower than the other.
    """
    given = [(folder, workload, arm, seed, seconds, steps) for arm, seed, steps in runs]
    processes = [multiprocessing.get_context("spawn").Process(target=kept, args=args) for args in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a run of {workload} failed.")
    return [kept(*args) for args in given]


def fitting_steps(folder: Path, workload: str, seconds: float) -> tuple[int, list[dict]]:
    """The steps that take so many seconds, found as one does by hand: short runs, longer ones, whole ones."""
    steps, tried = 100, []
    for share in (0.1, 0.5, 1.0):
        found = side_by_side(folder, workload, seconds, [("fixed", seed, steps) for seed in SEEDS])
        took = statistics.mean(run["seconds"] for run in found)
        loss = statistics.mean(run["metrics"][build_workload(workload).metric] for run in found)
        tried.append({"steps": steps, "seconds": took, "loss": loss})
        steps = round(steps * share * seconds / took)
    return steps, tried


def all_runs(budgets: list[str], seeds: int, folder: Path) -> list[dict]:
    """Of each workload and budget what was tried by hand, the steps of its arms and their runs."""
    found: list[dict] = []
    for budget in budgets:
        name, _, seconds = budget.partition("=")
        steps, tried = fitting_steps(folder, name, float(seconds))
        arms = {"budgeted": None, "fixed": steps, "cut off": round(TOO_MANY * steps)}
        document = {"workload": name, "budget_seconds": float(seconds), "tried_by_hand": tried, "steps": arms}
        document["args_by_hand"] = BY_HAND.get((name, float(seconds)), {})
        found.append(document | {"runs": {arm: [] for arm in arms}})
    for document in found:
        workload, seconds, steps = document["workload"], document["budget_seconds"], document["steps"]
        pairs = [[("budgeted", seed), ("fixed", seed)] for seed in range(1, seeds + 1)]
        pairs += [[("cut off", seed), ("cut off", seed + 1)] for seed in range(1, min(seeds, CUT_OFF_SEEDS), 2)]
        for pair in pairs:
            made = side_by_side(folder, workload, seconds, [(arm, seed, steps[arm]) for arm, seed in pair])
            for (arm, seed), run in zip(pair, made, strict=True):
                document["runs"][arm].append({"seed": seed} | run)
    return found


def slope(half: dict, whole: list[dict], metric: str) -> float:
    """Loss against log seconds, from a run of half the length to the mean of the whole ones."""
    losses = statistics.mean(run["metrics"][metric] for run in whole)
    logs = statistics.mean(math.log(run["seconds"]) for run in whole)
    return (half["loss"] - losses) / (math.log(half["seconds"]) - logs)


def compared(found: dict) -> dict:
    """The record of a workload and a budget."""
    workload = build_workload(found["workload"])
    runs = found.pop("runs")
    losses = {arm: [run["metrics"][workload.metric] for run in own] for arm, own in runs.items()}
    along = slope(found["tried_by_hand"][-1], runs["fixed"], workload.metric)
    losses["fixed at equal time"] = [
        fixed["metrics"][workload.metric] + along * math.log(budgeted["seconds"] / fixed["seconds"])
        for budgeted, fixed in zip(runs["budgeted"], runs["fixed"], strict=True)
    ]
    against = {
        arm: vars(non_inferiority(losses["budgeted"][: len(losses[arm])], losses[arm], workload.margin))
        for arm in ("fixed at equal time", "fixed", "cut off")
    }
    return found | {
        "metric": workload.metric,
        "margin": workload.margin,
        "loss_by_log_seconds": along,
        "mean": {arm: statistics.mean(values) for arm, values in losses.items()},
        "mean_seconds": {arm: statistics.mean(run["seconds"] for run in own) for arm, own in runs.items()},
        "budgeted_against_fixed_at_equal_time": against["fixed at equal time"],
        "budgeted_against_fixed": against["fixed"],
        "budgeted_against_cut_off": against["cut off"] | {"better": against["cut off"]["high"] < 0},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="+", metavar="WORKLOAD=SECONDS")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--records", type=Path, default=Path("accel_output/budget"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/budget.json"))
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    options.records.mkdir(parents=True, exist_ok=True)
    found = [compared(document) for document in all_runs(options.budgets, options.seeds, options.records)]
    there = json.loads(options.out.read_text())["compared"] if options.out.exists() else []
    new = {(document["workload"], document["budget_seconds"]) for document in found}
    kept_ones = [old for old in there if (old["workload"], old["budget_seconds"]) not in new]
    record = {
        "what": "a budgeted run, the fixed-step run of the same time, and a cosine cut off by the clock",
        "seconds_are": "CPU seconds of the process, one thread: the machine had other work",
        "compared": sorted(kept_ones + found, key=lambda document: document["workload"]),
        "machine": machine(),
        "versions": cache.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for document in found:
        print({key: value for key, value in document.items() if key != "runs"})


if __name__ == "__main__":
    main()
