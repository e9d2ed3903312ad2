"""DiLoCo against an exchange of gradients at every step: what two ranks send, and how good the model becomes.

    python benchmarks/diloco.py [--seeds 5] [--record docs/evidence/diloco.json]

All arms train the workload's model on two ranks (gloo, one thread each) with the arguments of its tuned baseline, whose
batch the ranks share, so that DDP is that baseline; all see the same number of tokens.  `DiLoCo` meets every 20 steps,
with the outer optimizer of its paper and with less momentum, as fits runs of few meetings.  Bytes are what one rank
gives to the other, gradients as DDP's buckets hold them.  A DiLoCo is called as good as DDP where its loss is at most
the workload's margin above that of DDP, over paired seeds.

Arms alternate, seed by seed.  Runs that were made before are taken from the folder of records, so that a benchmark can
be stopped and go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests" / "distributed"))

import torch.distributed as dist
from ranks import assert_backend, backend_args, run_on_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_accel import AccelTrainer, DiLoCo
from hf_accel.clock import parse_budget
from hf_accel.compare import build_workload, cache
from hf_accel.compare.cache import machine
from hf_accel.compare.statistics import non_inferiority
from hf_accel.compare.worker import HARNESS
from hf_accel.compare.workloads import DATA_ROOT

RANKS, EVERY = 2, 20

ARMS: dict[str, dict[str, float]] = {
    "DDP": {},
    "DiLoCo": {"outer_lr": 0.7, "outer_momentum": 0.9},
    "DiLoCo, less momentum": {"outer_lr": 0.7, "outer_momentum": 0.5},
}
"""The fields of the technique, of those that have it."""


class Sent(TrainerCallback):
    """Counts the bytes of the gradients that DDP exchanges."""

    def __init__(self, trainer: Any):
        self.trainer, self.bytes = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.model_wrapped.register_comm_hook(None, lambda _, bucket: self.exchange(bucket))

    def exchange(self, bucket: dist.GradBucket) -> Any:
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)  # as DDP does without a hook


def trained(name: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train an arm on this rank and evaluate it."""
    workload = build_workload(name)
    set_seed(seed)
    task = workload.build()
    args = workload.baseline_args() | HARNESS | backend_args("ddp") | {"seed": seed, "max_steps": steps}
    args["per_device_train_batch_size"] //= RANKS
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, dataloader_pin_memory=False, **args)
        set_seed(seed)
        fields = ARMS[arm]
        techniques = [DiLoCo(every=EVERY, **fields)] if fields else []
        trainer = AccelTrainer(args=settings, techniques=techniques, **task)
        trainer.pop_callback(PrinterCallback)
        if not fields:
            trainer.add_callback(sent := Sent(trainer))
        began = time.process_time()
        trainer.train()
        took = time.process_time() - began
        assert_backend(trainer, "ddp", RANKS)
        metrics = trainer.evaluate()
    report = trainer.receipt.techniques[0]["report"] if fields else {"bytes": sent.bytes}
    return {
        "steps": trainer.state.global_step,
        "tokens": trainer.receipt.tokens,
        "bytes": report["bytes"],
        "cpu_seconds": round(took, 3),
        "eval_loss": metrics["eval_loss"],
    }


def kept(folder: Path, name: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """The record of a run, made now if there is none."""
    path = folder / f"{name}-{arm}-{seed}-{steps}.json".replace(", ", "-").replace(" ", "-")
    if not path.exists():
        first, *others = run_on_ranks(trained, name, arm, seed, steps, timeout=3600)
        assert all(other["eval_loss"] == first["eval_loss"] for other in others), "ranks disagree"
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(first) + "\n")
        scratch.replace(path)
        print(path.stem, json.dumps(first), flush=True)
    return json.loads(path.read_text())


def compared(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each arm its means, and of those with the technique the verdict against DDP."""
    margin, found = build_workload(name).margin, {}
    losses = {arm: [run["eval_loss"] for run in own] for arm, own in runs.items()}
    sent = {arm: statistics.fmean(run["bytes"] for run in own) for arm, own in runs.items()}
    for arm, fields in ARMS.items():
        found[arm] = {
            "fields": fields | ({"every": EVERY} if fields else {}),
            "loss": statistics.fmean(losses[arm]),
            "losses": losses[arm],
            "bytes_of_a_rank": round(sent[arm]),
            "share_of_bytes": sent[arm] / sent["DDP"],
        }
        if fields:
            found[arm]["against_ddp"] = vars(non_inferiority(losses[arm], losses["DDP"], margin))
    return found


def text_of(found: dict[str, Any], runs: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    """What the technique's card says."""
    said = []
    for of_arm in found.values():
        if fields := of_arm["fields"]:
            against = of_arm["against_ddp"]
            difference, low, high = (against[key] for key in ("difference", "low", "high"))
            said.append(
                f"with an outer momentum of {fields['outer_momentum']:g}, the loss minus that of DDP is "
                f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]: **{against['verdict']}**"
            )
    margin = found["DiLoCo"]["against_ddp"]["margin"]
    one = runs["DDP"][0]
    return (
        f"two ranks, {one['steps']} steps, {seeds} seeds, {found['DiLoCo']['share_of_bytes']:.1%} of DDP's bytes, "
        f"equal tokens and a margin of {margin:.4f}: {'; '.join(said)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="code-lm")
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--steps", type=int, help="instead of the workload's budget")
    parser.add_argument("--records", type=Path, default=Path("accel_output/diloco"))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    logging.set_verbosity_error()
    options.records.mkdir(parents=True, exist_ok=True)
    workload = build_workload(options.workload)
    unit, amount = parse_budget(workload.nominal_budget())
    assert unit == "samples"
    steps = options.steps or math.ceil(amount / workload.baseline_args()["per_device_train_batch_size"])
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(1, options.seeds + 1):
        for arm in ARMS:
            runs[arm].append({"seed": seed} | kept(options.records, options.workload, arm, seed, steps))
    found = compared(options.workload, runs)
    text = text_of(found, runs, options.seeds)
    print(text)
    if options.record is not None:
        record = {
            "what": "DiLoCo against DDP at equal tokens: what is sent, and the loss",
            "workload": options.workload,
            "ranks": RANKS,
            "seeds": list(range(1, options.seeds + 1)),
            "compared": found,
            "findings": [{"technique": "DiLoCo", "workload": options.workload, "text": text, "gained": None}],
            "runs": runs,
            "machine": machine(),
            "versions": cache.versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        options.record.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
