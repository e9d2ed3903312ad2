"""What hosting costs: the step time of AccelTrainer without a technique over Trainer's, receipt on.

Two trainers of the same model run in one process and hand over to each other after every few steps, so that both see
the same machine.  The ratio of a pair of blocks is that of the medians of their steps, a step being all that happens
between two beginnings of one; its interval is Student's t on the logarithms.

    python benchmarks/overhead.py [--blocks 300] [--steps 5] [--out docs/evidence/overhead.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_accel import AccelTrainer


class Baton(TrainerCallback):
    """Trains a block of steps, hands over to the other trainer, and measures only its own turns."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore, steps: int):
        self.mine, self.others, self.steps = mine, others, steps
        self.blocks: list[list[tuple[float, float]]] = []
        self.mark = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.mark is not None:
            wall, cpu = self.mark
            self.blocks[-1].append((time.perf_counter() - wall, time.thread_time() - cpu))
        if state.global_step % self.steps == 0:
            self.others.release()
            self.mine.acquire()
            self.blocks.append([])
        self.mark = time.perf_counter(), time.thread_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.others.release()


class Tokens(torch.utils.data.Dataset):
    def __init__(self, num_examples: int, length: int):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(3, 256, (num_examples, length), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer_of(kind, model, data, steps, directory, baton) -> Trainer:
    args = TrainingArguments(
        directory,
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = kind(model=model, args=args, train_dataset=data, callbacks=[baton])
    trainer.pop_callback(transformers.PrinterCallback)
    return trainer


def interval(ratios: list[float]) -> dict[str, float]:
    logs = [math.log(r) for r in ratios]
    mean, error = statistics.mean(logs), stats.sem(logs)
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=mean, scale=error)
    return {"ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="docs/evidence/overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    data = Tokens(1024, 64)
    turns = threading.Semaphore(0), threading.Semaphore(0)
    batons, threads = [], []
    with tempfile.TemporaryDirectory() as directory:
        for i, kind in enumerate((Trainer, AccelTrainer)):
            torch.manual_seed(0)
            batons.append(Baton(turns[i], turns[1 - i], options.steps))
            steps = options.steps * (options.blocks + 1)
            trainer = trainer_of(kind, LlamaForCausalLM(config), data, steps, directory, batons[i])
            threads.append(threading.Thread(target=trainer.train))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    step_ms = []
    # The first block warms up.
    for plain, hosted in list(zip(batons[0].blocks, batons[1].blocks, strict=True))[1 : options.blocks + 1]:
        for i, clock in enumerate(ratios):
            medians = [statistics.median(duration[i] for duration in block) for block in (plain, hosted)]
            ratios[clock].append(medians[1] / medians[0])
        step_ms.append(1000 * statistics.median(duration[0] for duration in plain))
    record = {
        "what": "step time of AccelTrainer without a technique over Trainer, receipt on",
        "pairs_of_blocks": options.blocks,
        "steps_per_block": options.steps,
        "step_ms_median": statistics.median(step_ms),
        "interval": "95 %, Student's t on log ratios of block medians",
        **{clock: interval(values) for clock, values in ratios.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
