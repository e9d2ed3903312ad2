"""A teacher for the evidence of Distillation: a workload's model, twice as wide, trained with the tuned arguments.

python benchmarks/teacher.py novels-lm accel_output/teacher-novels-lm --horizon 1.5 --data DATA
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, set_seed

from hf_accel.clock import parse_budget
from hf_accel.compare.worker import HARNESS, make_trainer
from hf_accel.compare.workloads import DATA_ROOT, build_workload
from hf_accel.recipe import Recipe

WIDER = ("hidden_size", "intermediate_size", "num_attention_heads")
"""What is doubled."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--horizon", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.data is not None:
        os.environ[DATA_ROOT] = str(options.data)
    torch.set_num_threads(1)
    workload = build_workload(options.workload, {})
    set_seed(options.seed)
    task = workload.build()
    config = task["model"].config
    for name in WIDER:
        setattr(config, name, 2 * getattr(config, name))
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    task["model"] = type(task["model"])(config)
    unit, amount = parse_budget(workload.nominal_budget())
    args = workload.baseline_args() | HARNESS | {"output_dir": str(options.folder), "seed": options.seed}
    trainer: Trainer = make_trainer(
        task, args, Recipe(args=args), f"{amount * options.horizon:g}{unit}", TrainerCallback()
    )
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    said = {"eval_loss": loss, "cpu_seconds": seconds, "horizon": options.horizon}
    (options.folder / "teacher.json").write_text(json.dumps(said) + "\n")
    print(said)


if __name__ == "__main__":
    main()
