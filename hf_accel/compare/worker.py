"""Measures runs of a comparison, each in its own process.

``python -m hf_accel.compare.worker`` reads jobs from its standard input, one line of JSON each, and answers with exit
statuses.  It imports everything once and forks for each job, so that a fresh process need not import again.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_accel import losses
from hf_accel.clock import parse_budget
from hf_accel.compare.operations import Operations
from hf_accel.compare.workloads import build_workload
from hf_accel.receipt import Receipt, peak_memory_bytes
from hf_accel.recipe import Recipe
from hf_accel.trainer import AccelTrainer, AccelTrainerMixin


class Meter:
    """Counts CPU and wall seconds since its construction; CPU seconds include those of finished children."""

    def __init__(self) -> None:
        self.began = self._now()

    def _now(self) -> tuple[float, float]:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far."""
        wall, cpu = self._now()
        return {"wall_seconds": wall - self.began[0], "cpu_seconds": cpu - self.began[1]}


class SetUp(TrainerCallback):
    """Notes the seconds before the first step: construction, scoring passes, a teacher, growth."""

    def __init__(self, meter: Meter):
        self.meter, self.seconds = meter, {}
        self.counting: dict[str, float] = {}
        """Seconds of counting operations so far, which the run is not charged for."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds = self.seconds or without(self.meter.seconds(), self.counting)


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train once and evaluate.

    The run is charged for the training section: from the construction of the trainer to the return of ``train()``.
    Imports, data, building the model, two warm-up steps and the final evaluation are reported, not charged.
    """
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
    meter = Meter()
    workload = build_workload(run["workload"], run["options"])
    set_seed(run["seed"])
    task = workload.build()
    if (name := run.get("metric")) is not None:
        task["compute_metrics"] = with_metric(name, task.get("compute_metrics"))
    prepared, resident = meter.seconds(), resident_bytes()
    recipe = Recipe.from_dict(run["recipe"])
    with tempfile.TemporaryDirectory() as folder:
        args = recipe.args | {"output_dir": folder, "seed": run["seed"]} | HARNESS
        if "data_seed" in args:  # another order for each seed, of group_by_length by the seed of the run
            args["seed"] = args["data_seed"] = args["data_seed"] + run["seed"]
        warm_up(task, args)
        set_seed(run["seed"])
        reset_peak_memory()
        meter = Meter()
        set_up = SetUp(meter)
        trainer = make_trainer(task, args, recipe, run["budget"], set_up, hosted=run.get("hosted", False))
        operations = Operations(trainer, on_accelerator=run.get("counts_operations", False))
        set_up.counting = operations.spent
        operations.train(trainer)
        section = without(meter.seconds(), operations.spent)
        device = trainer.args.device
        peak = max(peak_memory_bytes(device) - (0 if device.type == "cuda" else resident), 0)
        meter = Meter()
        metrics = trainer.evaluate()
    evaluation, receipt = meter.seconds(), receipt_of(trainer)
    return {
        "status": "finished",
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        "costs": section | work_done(trainer) | {"flops": operations.executed},
        "uncharged": {"preparation": prepared, "evaluation": evaluation, "counting": operations.spent},
        "set_up": set_up.seconds,
        "peak_memory_bytes": peak,
        "phases": {name: seconds for name, seconds in receipt.seconds.items() if name != "counting"} if receipt else {},
        "techniques": receipt.techniques if receipt else [],
        "log": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }


def resident_bytes() -> int:
    """Return the resident memory; 0 if the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def reset_peak_memory() -> None:
    """Reset the peak; only Linux can reset that of resident memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def without(seconds: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """Subtract seconds by name."""
    return {name: value - others.get(name, 0.0) for name, value in seconds.items()}


HARNESS = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 0.05,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Arguments that the comparison sets for every arm."""


def make_trainer(
    task: dict[str, Any],
    args: dict[str, Any],
    recipe: Recipe,
    budget: str,
    callback: TrainerCallback,
    hosted: bool = False,
) -> Trainer:
    """Build an arm's trainer: without techniques, Trainer itself, so that only arms that need AccelTrainer pay for it.

    Trainer mis-scales the losses of some models when it accumulates gradients; their baseline uses AccelTrainer.
    """
    unit, amount = parse_budget(budget)
    horizon: dict[str, Any] | None = None
    accumulation = args.get("gradient_accumulation_steps", 1)
    misscaled = accumulation > 1 and not losses.honors_num_items(task["model"])
    plain = not recipe.techniques and not hosted and not misscaled
    if plain and unit == "epochs":
        horizon = {"num_train_epochs": amount}
    elif plain and unit in ("steps", "samples"):
        size = args.get("per_device_train_batch_size", 8) * accumulation if unit == "samples" else 1
        horizon = {"max_steps": max(math.ceil(amount / size), 1)}
    args = {name: value for name, value in args.items() if name not in ("max_steps", "num_train_epochs")}
    arguments = TrainingArguments(**args, **(horizon or {}))
    arguments.dataloader_pin_memory &= torch.accelerator.is_available()
    if horizon is not None:
        trainer: Trainer = Trainer(args=arguments, callbacks=[callback], **task)
    else:
        recipe = Recipe(args=recipe.args, budget=budget, techniques=recipe.techniques)
        trainer = AccelTrainer(
            args=arguments,
            techniques=recipe.build_techniques(),
            micro_batch_size=arguments.per_device_train_batch_size if misscaled else None,
            callbacks=[callback],
            **task,
        )
    trainer.pop_callback(PrinterCallback)
    return trainer


def with_metric(metric: str, own: Callable | None) -> Callable:
    """Compute the workload's own metrics, and one of ``evaluate`` if they have none of its name."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found = {} if own is None else dict(own(prediction))
        if Path(metric).name.removeprefix("eval_") in found:
            return found
        from hf_accel.compare.workloads.metrics import evaluate_metric

        return found | evaluate_metric(metric)(prediction)

    return compute


def warm_up(task: dict[str, Any], args: dict[str, Any]) -> None:
    """Take two plain steps on a copy of the model, so that no arm pays for lazy imports and first allocations."""
    arguments = TrainingArguments(**(args | {"max_steps": 2, "warmup_steps": 0, "logging_strategy": "no"}))
    arguments.dataloader_pin_memory &= torch.accelerator.is_available()
    trainer = Trainer(args=arguments, **(task | {"model": copy.deepcopy(task["model"])}))
    trainer.pop_callback(PrinterCallback)
    trainer.train()


def receipt_of(trainer: Trainer) -> Receipt | None:
    """Return the receipt of an AccelTrainer's run."""
    return trainer.receipt if isinstance(trainer, AccelTrainerMixin) else None


def work_done(trainer: Trainer) -> dict[str, float]:
    """Return steps, samples, and tokens, which are 0 for a plain Trainer."""
    if (receipt := receipt_of(trainer)) is not None:
        counts = {"steps": receipt.steps, "samples": receipt.samples, "tokens": receipt.tokens}
    else:
        steps, length = trainer.state.global_step, len(trainer.train_dataset)  # type: ignore[arg-type]
        size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        epochs, rest = divmod(steps, math.ceil(length / size))
        counts = {"steps": steps, "samples": epochs * length + rest * size, "tokens": 0}
    return {name: float(count) for name, count in counts.items()}


def run_job(job: dict[str, Any]) -> None:
    """Measure a run and write its record, also if it fails."""
    began = time.perf_counter()
    record: dict[str, Any]
    try:
        record = measure(job["run"])
    except Exception as error:
        traceback.print_exc()
        record = {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    record["whole_seconds"] = time.perf_counter() - began
    path = Path(job["record"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"run": job["run"], **record}, indent=1) + "\n")
    partial.replace(path)


def fork_job(job: dict[str, Any]) -> int:
    """Run a job in a fork of this process, with its output in the job's log; return the exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_job(job)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries is no answer
    gc.collect()
    gc.freeze()  # otherwise every run would spend a quarter second collecting the garbage of the imports
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(fork_job(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
