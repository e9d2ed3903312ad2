"""Counts the positions of an epoch in three orders: at random, in Trainer's ``group_by_length``, in `LengthGrouped`'s.

    python benchmarks/length_grouping.py [--data DATA] [--record FILE]

A micro-batch costs its rows times its longest row.  The counts are means over five orders.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_accel.compare import cache
from hf_accel.compare.workloads import DATA_ROOT, build_workload
from hf_accel.data.batching.length_grouped import LengthGrouped, group_by_length

WORKLOADS = ("banking77", "gsm8k-sft")
SEEDS = (1, 2, 3, 4, 5)


def positions(order_N: Tensor, lengths_N: Tensor, batch_size: int) -> int:
    """Return the positions of all micro-batches, padding included."""
    return sum(int(rows.max()) * len(rows) for rows in lengths_N[order_N].split(batch_size))


def orders(lengths_N: Tensor, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Return the orders of an epoch."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    trainers = get_length_grouped_indices(lengths_N.tolist(), batch_size, generator=generator())
    return {
        "at random": torch.randperm(len(lengths_N), generator=generator()),
        "Trainer's group_by_length": torch.tensor(trainers),
        "LengthGrouped": group_by_length(lengths_N, batch_size, LengthGrouped().mega_batch, generator()),
    }


def count(name: str) -> dict[str, float]:
    """Return the mean positions of a workload's epoch by order."""
    workload = build_workload(name)
    data, size = workload.build()["train_dataset"], workload.baseline_args()["per_device_train_batch_size"]
    lengths_N = torch.tensor([len(row) for row in data["input_ids"]])
    found: dict[str, list[int]] = {}
    for seed in SEEDS:
        for order, order_N in orders(lengths_N, size, seed).items():
            found.setdefault(order, []).append(positions(order_N, lengths_N, size))
    return {order: sum(values) / len(values) for order, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    counts = {name: count(name) for name in WORKLOADS}
    findings = []
    for name, found in counts.items():
        shares = [f"{order} {value:,.0f}" for order, value in found.items()]
        text = f"positions of an epoch, padding included: {', '.join(shares)}"
        print(f"{name}: {text}")
        findings.append({"technique": "LengthGrouped", "workload": name, "text": text, "gained": None})
    if options.record is not None:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        about = {"seeds": SEEDS, "machine": cache.machine(), "date": date}
        options.record.write_text(json.dumps(about | {"findings": findings, "positions": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
