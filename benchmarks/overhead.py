"""What hosting costs: the step time of AccelTrainer without a technique over Trainer's, receipt on.

Two trainers of the same model run in one process and hand over to each other after every few steps, so that both see
the same machine.  The ratio of a pair of blocks is that of the medians of their steps, a step being all that happens
between two beginnings of one.  Where a trainer's tensors come to lie makes it one percent faster or slower for as long
as it lives (Trainer against itself shows it), so there are many such meetings, each of two fresh trainers, the first
one of either kind in turn; the interval is Student's t over the mean logarithms of the meetings.

    python benchmarks/overhead.py [--meetings 40] [--blocks 12] [--steps 5] [--out docs/evidence/overhead.json]
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


def meet(kinds, data, blocks: int, steps: int) -> dict[type, list[list[tuple[float, float]]]]:
    """Train two fresh trainers in turns; the wall and CPU seconds of each one's steps, block by block."""
    turns = threading.Semaphore(0), threading.Semaphore(0)
    batons, threads = [], []
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as directory:
        for i, kind in enumerate(kinds):
            torch.manual_seed(0)
            batons.append(Baton(turns[i], turns[1 - i], steps))
            trainer = trainer_of(kind, LlamaForCausalLM(config), data, steps * (blocks + 1), directory, batons[i])
            threads.append(threading.Thread(target=trainer.train))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The first block warms up.
    return {kind: baton.blocks[1 : blocks + 1] for kind, baton in zip(kinds, batons, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meetings", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="docs/evidence/overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Tokens(1024, 64)
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    step_ms = []
    for number in range(options.meetings):
        kinds = (Trainer, AccelTrainer) if number % 2 == 0 else (AccelTrainer, Trainer)
        found = meet(kinds, data, options.blocks, options.steps)
        for i, clock in enumerate(ratios):
            plain, hosted = (
                [statistics.median(duration[i] for duration in block) for block in found[kind]]
                for kind in (Trainer, AccelTrainer)
            )
            pairs = zip(plain, hosted, strict=True)
            ratios[clock].append(math.exp(statistics.fmean(math.log(theirs / own) for own, theirs in pairs)))
        step_ms += [1000 * statistics.median(duration[0] for duration in block) for block in found[Trainer]]
    record = {
        "what": "step time of AccelTrainer without a technique over Trainer, receipt on",
        "meetings": options.meetings,
        "pairs_of_blocks": options.meetings * options.blocks,
        "steps_per_block": options.steps,
        "step_ms_median": statistics.median(step_ms),
        "interval": "95 %, Student's t over the mean log ratios of the meetings",
        **{clock: interval(values) for clock, values in ratios.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
