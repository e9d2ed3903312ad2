"""How long a step of a convolutional network takes with `ChannelsLast`, over the usual memory format.

Forward and backward pass of the same images, in float32 on one thread; the two take turns, and each pair of turns gives
one ratio of CPU times.

    python benchmarks/channels_last.py [--pairs 12] [--out docs/evidence/channels-last.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from overhead import interval
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_accel import ChannelsLast

IMAGES, SIZE = 16, 64
MODELS = {
    "ResNet-18": lambda: ResNetForImageClassification(
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10)
    ),
    "ConvNeXt, 4 stages of 48 to 384": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 6, 2], num_labels=10)
    ),
}


def turn(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """CPU seconds of a step, and its loss."""
    model.zero_grad()
    began = time.process_time()
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    return time.process_time() - began, float(loss.detach())


def measure(name: str, pairs: int) -> dict:
    torch.manual_seed(0)
    usual = MODELS[name]().train()
    last = copy.deepcopy(usual)
    ChannelsLast().on_train_begin(SimpleNamespace(deepspeed_plugin=None), None, None, model=last)
    images, labels = torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(10, (IMAGES,))
    ratios, seconds, furthest = [], [], 0.0
    for number in range(pairs + 1):
        order = (usual, last) if number % 2 == 0 else (last, usual)
        taken = {model: turn(model, images, labels) for model in order}
        furthest = max(furthest, abs(taken[last][1] - taken[usual][1]) / taken[usual][1])
        if number:  # the first pair warms up
            ratios.append(taken[last][0] / taken[usual][0])
            seconds.append(taken[usual][0])
    return {
        "usual_cpu_seconds_median": statistics.median(seconds),
        "channels_last_over_usual": interval(ratios),
        "largest_relative_difference_of_the_loss": furthest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", default="docs/evidence/channels-last.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    record = {
        "what": "CPU time of a forward and backward pass with ChannelsLast over that in the usual memory format",
        "images": IMAGES,
        "size": SIZE,
        "pairs": options.pairs,
        "interval": "95 %, Student's t over the log ratios of the pairs",
        "models": {name: measure(name, options.pairs) for name in MODELS},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {load:.1f} at the start",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
