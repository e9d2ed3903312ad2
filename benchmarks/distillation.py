"""What distillation saves, with its teacher charged and not charged.

    python benchmarks/distillation.py sst2 novels-lm [--data FOLDER] [--out docs/evidence/distillation.json]

The teacher is the workload's model, twice as wide, trained once on the same data with the arguments of the tuned
baseline, over the nominal horizon.  The student is trained for half of it.  Three accounts of its CPU seconds go
against the same curve of the tuned baseline:

    charged            its own, and those that the teacher was trained for
    teacher given      its own, in which are the teacher's forward passes
    not charged        its own without the seconds that the receipt has under Distillation
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from statistics import fmean

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from hf_accel.compare import build_workload, cache
from hf_accel.compare.cache import machine
from hf_accel.compare.comparison import Arm, Comparison
from hf_accel.compare.statistics import speed_up
from hf_accel.compare.worker import HARNESS, make_trainer
from hf_accel.compare.workloads import DATA_ROOT
from hf_accel.recipe import Recipe

HORIZONS = (0.25, 0.5, 1.0)
SHARE = 0.5
SEED = 77
"""The teacher's, which no comparison uses."""

WIDER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def train_teacher(name: str, folder: Path) -> dict[str, float]:
    """A teacher in the folder, if there is none; its loss and the CPU seconds of its training."""
    said = folder / "teacher.json"
    if said.exists():
        return json.loads(said.read_text())
    torch.set_num_threads(1)
    workload = build_workload(name)
    set_seed(SEED)
    task = workload.build()
    config = task["model"].config
    for field in WIDER:
        if getattr(config, field, None):
            setattr(config, field, 2 * getattr(config, field))
    if getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    task["model"] = type(task["model"])(config)
    args = workload.baseline_args() | HARNESS | {"output_dir": str(folder), "seed": SEED}
    trainer = make_trainer(task, args, Recipe(args=args), workload.nominal_budget(), TrainerCallback())
    began = time.process_time()
    trainer.train()
    found = {"cpu_seconds": time.process_time() - began, "eval_loss": trainer.evaluate()["eval_loss"]}
    trainer.save_model()
    said.write_text(json.dumps(found) + "\n")
    return found


def compared(name: str, seeds: int, slots: int, folder: Path) -> dict:
    """The three speed-ups of a workload; runs that were made before are taken from the folder."""
    teacher_folder = folder / f"teacher-{name}"
    teacher = train_teacher(name, teacher_folder)
    recipe = Recipe(techniques=[{"Distillation": {"teacher": str(teacher_folder)}}])
    comparison = Comparison(
        [Arm("Distillation", recipe, horizon=SHARE)],
        name,
        horizons=HORIZONS,
        seeds=seeds,
        placebos=False,
        out=folder / name,
        slots=slots,
    )
    runs = {(run["arm"], run["horizon"], run["seed"]): run for run in comparison.run().to_dict()["runs"]}
    numbers = range(1, seeds + 1)
    baseline = [[runs["baseline", horizon, seed] for horizon in HORIZONS] for seed in numbers]
    costs, losses = (
        [[run[part][key] for run in of_seed] for of_seed in baseline]
        for part, key in (("costs", "cpu_seconds"), ("metrics", "eval_loss"))
    )
    own = [runs["Distillation", SHARE, seed] for seed in numbers]
    paid = [run["costs"]["cpu_seconds"] for run in own]
    teaching = [
        sum(s for phase, s in run["phases"].items() if phase.endswith(".Distillation")) / sum(run["phases"].values())
        for run in own
    ]
    accounts = {
        "charged": [seconds + teacher["cpu_seconds"] for seconds in paid],
        "teacher given": paid,
        "not charged": [seconds * (1 - share) for seconds, share in zip(paid, teaching, strict=True)],
    }
    reached = [run["metrics"]["eval_loss"] for run in own]
    found = {account: speed_up(costs, losses, seconds, reached) for account, seconds in accounts.items()}
    return {
        "teacher": teacher,
        "losses": reached,
        "baseline_losses": losses,
        "baseline_cpu_seconds": costs,
        "cpu_seconds": accounts,
        "speed_ups": {
            account: {"text": str(value), "kind": value.kind, "low": value.low} for account, value in found.items()
        },
    }


def finding(name: str, found: dict) -> dict:
    """What a card says of a workload."""
    said = {account: value["text"] for account, value in found["speed_ups"].items()}
    charged, teacher = found["speed_ups"]["charged"], found["teacher"]
    own = fmean(of_seed[-1] for of_seed in found["baseline_losses"])
    return {
        "technique": "Distillation",
        "workload": name,
        "text": f"with a teacher twice as wide, trained in {teacher['cpu_seconds']:.0f} CPU seconds to a loss of "
        f"{teacher['eval_loss']:.3f} (the tuned baseline's, after as many steps: {own:.3f}), the speed-up at equal "
        f"loss over that baseline is **{said['charged']}** where its training is charged, {said['teacher given']} "
        f"where it was there, and {said['not charged']} where its answers cost nothing either",
        "gained": charged["kind"] != "miss" and charged["low"] > 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--records", type=Path, default=Path("accel_output/distillation"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/distillation.json"))
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    logging.set_verbosity_error()
    found = {name: compared(name, options.seeds, options.slots, options.records) for name in options.workloads}
    record = {
        "what": "speed-ups of Distillation at equal loss, with its teacher charged and not charged",
        "seeds": list(range(1, options.seeds + 1)),
        "horizons": HORIZONS,
        "share": SHARE,
        "workloads": found,
        "findings": [finding(name, of_workload) for name, of_workload in found.items()],
        "machine": machine(),
        "versions": cache.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for said in record["findings"]:
        print(said["workload"], said["text"])


if __name__ == "__main__":
    main()
