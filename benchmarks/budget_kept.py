"""Whether budgets are kept: on an idle machine, with other work from half-way on, killed and resumed.

    python benchmarks/budget_kept.py [60s 60s+load 60s+kill 2e6tok 2e12flop 1e14flop+wide] [--data FOLDER] [--out FILE]

Each run trains the model of the workload novels-lm in batches of 8, evaluates at every quarter and saves at every
eighth.  ``+load``: when half of the budget is spent, as many processes as the machine has cores begin to compute.
``+kill``: then the process is killed, and another one resumes its run.  ``+wide``: the model and the context are those
of the scale gpu, in single precision, and validation is on 32 texts.  A record that is there keeps the cases that are
not made anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_accel import AccelTrainer, Budget
from hf_accel.compare import build_workload, cache
from hf_accel.compare.cache import machine
from hf_accel.compare.workloads.workload import DATA_ROOT


class AtHalf(TrainerCallback):
    """Does something once, when half of the budget is spent."""

    def __init__(self, trainer, act):
        self.trainer, self.act = trainer, act

    def on_step_end(self, args, state, control, **kwargs):
        if self.act is not None and self.trainer.clock.progress >= 0.5:
            self.act()
            self.act = None


def compute() -> None:
    while True:
        sum(range(10**6))


def train(limit: str, folder: str, act=None, resume: bool = False, wide: bool = False) -> AccelTrainer:
    """Train within a limit."""
    workload = build_workload("novels-lm", {"scale": "gpu"} if wide else None)
    set_seed(1)
    task = workload.build()
    if wide:
        task["eval_dataset"] = task["eval_dataset"].select(range(32))
    args = workload.baseline_args() | {
        "per_device_train_batch_size": 8,
        "bf16": False,
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "save_strategy": "steps",
        "save_steps": 0.125,
        "save_total_limit": 2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": folder,
    }
    trainer = AccelTrainer(args=TrainingArguments(**args), techniques=[Budget(limit)], **task)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(AtHalf(trainer, act))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def kept(case: str) -> dict:
    """What came of a budget."""
    limit, _, event = case.partition("+")
    context, others = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder:
        if event == "kill":
            child = context.Process(target=train, args=(limit, folder, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            child.start()
            child.join()

        def load() -> None:
            for _ in range(os.cpu_count() or 1):
                others.append(context.Process(target=compute, daemon=True))
                others[-1].start()

        began = time.monotonic()
        trainer = train(limit, folder, load if event == "load" else None, resume=event == "kill", wide=event == "wide")
        took = time.monotonic() - began
        for other in others:
            other.kill()
    receipt = trainer.receipt
    assert receipt is not None
    evaluations = [e for e in trainer.state.log_history if "eval_runtime" in e]
    return {
        "case": case,
        "shares": receipt.techniques[0]["report"],
        "seconds": receipt.wall_seconds,
        "seconds_of_this_process": took,
        "steps": receipt.steps,
        "step_seconds_at_the_end": trainer.clock.step_seconds,
        "last_evaluation_seconds": evaluations[-1]["eval_runtime"],
        "evaluated_at": [e["step"] for e in evaluations],
        "final_learning_rate": receipt.final_learning_rate,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["60s", "60s+load", "60s+kill", "2e6tok", "2e12flop"])
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/budget-kept.json"))
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = []
    for case in options.cases:
        found.append(kept(case))
        print(json.dumps(found[-1]), flush=True)
    there = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    found = [*(run for run in there if run["case"] not in options.cases), *found]
    record = {
        "what": "budgets, and what was spent",
        "runs": found,
        "machine": machine(),
        "versions": cache.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
