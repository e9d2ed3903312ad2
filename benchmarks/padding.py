"""Real tokens a second of PaddingFree and Packing over padded batches, on texts of mixed length.

Three trainers of the same model on the same examples run in one process and hand over to each other after every few
steps, so that all see the same machine.  Their steps hold the same examples, so the ratio of the times of two blocks is
that of their real tokens a second.  There are several meetings of fresh trainers, each begun by another one; the
interval is Student's t over the mean logarithms of the meetings.  Both wall clock and the CPU time of the training
thread are taken: where others use the machine, the latter is what to look at.

The model is a causal Llama on both data sets, because BERT, which reads in both directions and classifies from its
first token, would mix flattened examples: both techniques refuse it.  Token ids are folded into 4096 to keep the head
small.

    python benchmarks/padding.py DATA [--meetings 4] [--blocks 2] [--steps 1] [--out docs/evidence/padding.json]

DATA holds sst2.parquet (column text) and gsm8k.parquet (columns prompt and completion), and the files of the tokenizers
of BERT and GPT-2 in bert-base-uncased/ and gpt2/.
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
from datasets import Dataset
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_accel import AccelTrainer, Packing, PaddingFree
from hf_accel.testing import collate_padded

VOCABULARY = 4096
ARMS = {"padded": [], "PaddingFree": [PaddingFree], "Packing": [Packing]}


class Baton(TrainerCallback):
    """Trains a block of steps, hands over to the next trainer, and measures only its own turns."""

    def __init__(self, mine: threading.Semaphore, next_one: threading.Semaphore, steps: int):
        self.mine, self.next_one, self.steps = mine, next_one, steps
        self.blocks: list[list[tuple[float, float]]] = []
        self.mark = None

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter(), time.thread_time()
        if self.mark is not None:
            self.blocks[-1].append((now[0] - self.mark[0], now[1] - self.mark[1]))
        if state.global_step % self.steps == 0:
            self.next_one.release()
            self.mine.acquire()
            self.blocks.append([])
        self.mark = time.perf_counter(), time.thread_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.next_one.release()


def texts(folder: Path) -> dict[str, tuple[Dataset, int]]:
    """Tokenized texts and the examples of a batch, by the name of the data set."""

    def tokenized(name: str, tokenizer: str, columns: list[str], number: int) -> Dataset:
        rows = Dataset.from_parquet(str(folder / f"{name}.parquet")).shuffle(seed=0).select(range(number))
        encode = transformers.PreTrainedTokenizerFast.from_pretrained(folder / tokenizer)
        joined = ["\n".join(parts) for parts in zip(*(rows[column] for column in columns), strict=True)]
        ids = [[i % VOCABULARY for i in row] for row in encode(joined)["input_ids"]]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    return {
        "sst2": (tokenized("sst2", "bert-base-uncased", ["text"], 4000), 32),
        "gsm8k": (tokenized("gsm8k", "gpt2", ["prompt", "completion"], 1000), 32),
    }


def meet(names: list[str], data: Dataset, batch_size: int, blocks: int, steps: int):
    """Train fresh trainers in turns; the seconds of each one's steps block by block, their losses and real tokens."""
    turns = [threading.Semaphore(0) for _ in names]
    batons, trainers, threads = [], [], []
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as directory:
        for i, name in enumerate(names):
            torch.manual_seed(0)
            batons.append(Baton(turns[i], turns[(i + 1) % len(names)], steps))
            args = TrainingArguments(
                directory,
                max_steps=steps * (blocks + 1) + 1,  # the last one ends the last block
                per_device_train_batch_size=batch_size,
                report_to=[],
                disable_tqdm=True,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
                data_seed=1,  # the global generators are those of all threads
            )
            trainers.append(
                AccelTrainer(
                    LlamaForCausalLM(config),
                    args,
                    train_dataset=data,
                    data_collator=collate_padded,
                    techniques=[kind() for kind in ARMS[name]],
                    callbacks=[batons[i]],
                    micro_batch_size=batch_size,
                )
            )
            trainers[i].pop_callback(transformers.PrinterCallback)
            threads.append(threading.Thread(target=trainers[i].train))
        # All stand at their first step; the last one's release starts the first one.
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    losses = {
        name: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for name, trainer in zip(names, trainers, strict=True)
    }
    tokens = {trainer.receipt.tokens for trainer in trainers}
    assert len(tokens) == 1, f"the arms trained on other tokens: {tokens}"
    # The first block warms up.
    return dict(zip(names, (baton.blocks[1 : blocks + 1] for baton in batons), strict=True)), losses, tokens.pop()


def interval(logs: list[float]) -> dict[str, float]:
    mean, error = statistics.mean(logs), stats.sem(logs)
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=mean, scale=error)
    return {"ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--meetings", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", default="docs/evidence/padding.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = {}
    for dataset, (data, batch_size) in texts(options.data).items():
        lengths = [len(ids) for ids in data["input_ids"]]
        logs = {arm: {"wall": [], "cpu": []} for arm in ARMS if arm != "padded"}
        furthest = dict.fromkeys(logs, 0.0)
        for number in range(options.meetings):
            names = list(ARMS)[number % 3 :] + list(ARMS)[: number % 3]
            blocks, losses, tokens = meet(names, data, batch_size, options.blocks, options.steps)
            for arm, clocks in logs.items():
                for i, clock in enumerate(clocks):
                    pairs = zip(blocks["padded"], blocks[arm], strict=True)
                    ratios = [math.log(sum(s[i] for s in padded) / sum(s[i] for s in own)) for padded, own in pairs]
                    clocks[clock].append(statistics.fmean(ratios))
                differences = [abs(a - b) / a for a, b in zip(losses["padded"], losses[arm], strict=True)]
                furthest[arm] = max(furthest[arm], *differences)
        results[dataset] = {
            "examples_of_a_batch": batch_size,
            "tokens_of_an_example": {"mean": statistics.mean(lengths), "longest": max(lengths)},
            "tokens_of_a_step": tokens / (options.steps * (options.blocks + 1) + 1),
            **{
                arm: {
                    "real_tokens_a_second_over_padded": {clock: interval(values) for clock, values in clocks.items()},
                    "largest_relative_difference_of_a_step_s_loss": furthest[arm],
                }
                for arm, clocks in logs.items()
            },
        }
    record = {
        "what": "real tokens a second over padded batches of the same examples, causal Llama in float32, sdpa",
        "meetings": options.meetings,
        "blocks_of_a_meeting": options.blocks,
        "steps_of_a_block": options.steps,
        "interval": "95 %, Student's t over the mean log ratios of the meetings",
        "data": results,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread; load {os.getloadavg()[1]:.1f}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
