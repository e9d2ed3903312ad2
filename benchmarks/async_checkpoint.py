"""How long a checkpoint holds training up: written in the loop, and while training goes on.

    python benchmarks/async_checkpoint.py [--pairs 4] [--record docs/evidence/async-checkpoint.json]

Both trainers have the same model and data, on one process with one thread, and save every few steps to the same disk;
one has ``async_checkpoints=True``.  Held up is what passes inside of Trainer's call that saves; the steps that follow
share the machine with the writing, so what they take more than steps of a run that saves nothing is given as well, and
the whole of ``train()``, the wait for the last checkpoint inside.  Runs come in groups of three, in turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from overhead import Tokens
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_accel import AccelTrainer
from hf_accel.compare import cache
from hf_accel.compare.cache import machine

STEPS, EVERY = 60, 20


class Timed(AccelTrainer):
    """Notes the seconds that pass inside of each save."""

    def _save_checkpoint(self, model, trial):
        began = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.held_up.append(time.perf_counter() - began)


def run(arm: str, folder: str) -> dict[str, float]:
    """Seconds of a run."""
    set_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16_000, **sizes))
    saving = {"save_strategy": "no"} if arm == "none" else {"save_strategy": "steps", "save_steps": EVERY}
    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **saving,
    )
    trainer = Timed(model=model, args=args, train_dataset=Tokens(256, 64), async_checkpoints=arm == "async")
    trainer.pop_callback(PrinterCallback)
    trainer.held_up = []
    began = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - began
    found = {"train": took, "held_up": statistics.fmean(trainer.held_up or [0.0])}
    if arm != "none":
        files = [path for path in Path(folder, f"checkpoint-{STEPS}").rglob("*") if path.is_file()]
        found["bytes"] = sum(path.stat().st_size for path in files)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--folder", help="on the disk to write to; else the system's for temporary files")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    arms = ["none", "sync", "async"]
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for number in range(options.pairs):
        for arm in arms[number % 3 :] + arms[: number % 3]:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                runs[arm].append(run(arm, folder))
            print(arm, runs[arm][-1], flush=True)
    median = {arm: statistics.median(found["held_up"] for found in runs[arm]) for arm in arms[1:]}
    train = {arm: statistics.median(found["train"] for found in runs[arm]) for arm in arms}
    record = {
        "what": "seconds that a checkpoint holds training up, written in the loop (sync) and beside it (async)",
        "steps": STEPS,
        "checkpoints": STEPS // EVERY,
        "bytes_of_a_checkpoint": runs["sync"][0]["bytes"],
        "held_up_seconds_of_a_checkpoint": median,
        "ratio": median["async"] / median["sync"],
        "train_seconds": train,
        "train_seconds_beyond_none_of_a_checkpoint": {
            arm: (train[arm] - train["none"]) / (STEPS // EVERY) for arm in arms[1:]
        },
        "runs": runs,
        "machine": machine(),
        "versions": cache.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    print({key: value for key, value in record.items() if key != "runs"})
    if options.record is not None:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
