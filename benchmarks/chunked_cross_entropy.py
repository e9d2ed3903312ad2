"""How long `ChunkedCrossEntropy` takes for loss and gradient, over the loss from all logits at once.

The same hidden states, weight and labels, of a vocabulary of 50,257 and 4,096 tokens, in float32 on one thread; the two
take turns, and each pair of turns gives one ratio of CPU times.  ``labeled`` is the share of the tokens with a label.

    python benchmarks/chunked_cross_entropy.py [--pairs 12] [--out docs/evidence/chunked-cross-entropy.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from overhead import interval
from torch import Tensor

from hf_accel.model.modules.chunked_cross_entropy import LOGITS_OF_A_CHUNK, chunked_cross_entropy

TOKENS, VOCABULARY = 4096, 50257
CASES = [(256, 1.0), (256, 0.15)]
"""Width of the hidden states, and the share of labeled tokens."""


def dense(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_NH, weight_VH), targets_N)


def chunked(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden_NH, weight_VH, None, targets_N).sum() / targets_N.ne(-100).sum()


def turn(loss: Callable[..., Tensor], hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> tuple[float, list]:
    """CPU seconds of loss and gradient, and both."""
    hidden_NH.grad = weight_VH.grad = None
    began = time.process_time()
    value = loss(hidden_NH, weight_VH, targets_N)
    value.backward()
    seconds = time.process_time() - began
    return seconds, [value.detach(), hidden_NH.grad, weight_VH.grad]


def measure(width: int, labeled: float, pairs: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(TOKENS, width, generator=generator).requires_grad_()
    weight_VH = (torch.randn(VOCABULARY, width, generator=generator) / math.sqrt(width)).requires_grad_()
    targets_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets_N[torch.rand(TOKENS, generator=generator) >= labeled] = -100
    arguments = hidden_NH, weight_VH, targets_N
    ratios, seconds, furthest = [], [], 0.0
    for number in range(pairs + 1):
        order = (dense, chunked) if number % 2 == 0 else (chunked, dense)
        taken = {loss: turn(loss, *arguments) for loss in order}
        expected, found = taken[dense][1], taken[chunked][1]
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
        furthest = max(furthest, *differences)
        if number:  # the first pair warms up
            ratios.append(taken[chunked][0] / taken[dense][0])
            seconds.append(taken[dense][0])
    return {
        "width": width,
        "labeled": labeled,
        "dense_cpu_seconds_median": statistics.median(seconds),
        "chunked_over_dense": interval(ratios),
        "largest_relative_difference": furthest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", default="docs/evidence/chunked-cross-entropy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    record = {
        "what": "CPU time of loss and gradient from chunks of the logits over those from all logits at once",
        "tokens": TOKENS,
        "vocabulary": VOCABULARY,
        "logits_of_a_chunk": LOGITS_OF_A_CHUNK["cpu"],
        "pairs": options.pairs,
        "interval": "95 %, Student's t over the log ratios of the pairs",
        "cases": [measure(width, labeled, options.pairs) for width, labeled in CASES],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {load:.1f} at the start",
        "versions": {"torch": torch.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
