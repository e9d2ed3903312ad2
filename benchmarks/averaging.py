"""What averaging costs: the step time with `ExponentialMovingAverage` over that with torch's own averaged model.

Both train the same model on the same data in one process and hand over to each other after every few steps, as in
`overhead.py`: one is AccelTrainer with the technique, the other a Trainer with a callback that calls
``torch.optim.swa_utils.AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(...)).update_parameters`` after each step.

    python benchmarks/averaging.py [--meetings 8] [--blocks 8] [--steps 5] [--out docs/evidence/averaging.json]
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
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from overhead import Baton, Tokens, interval, trainer_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_accel import AccelTrainer, ExponentialMovingAverage

HALF_LIFE = 100.0


class TorchAverage(TrainerCallback):
    """An average as torch's documentation keeps it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(2 ** (-1 / HALF_LIFE)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averaged.update_parameters(model)


def build(name, data, steps, directory, baton):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    if name == "torch":
        trainer = trainer_of(Trainer, model, data, steps, directory, baton)
        trainer.add_callback(TorchAverage())
        return trainer

    def with_average(**kwargs):
        return AccelTrainer(techniques=[ExponentialMovingAverage(HALF_LIFE)], **kwargs)

    return trainer_of(with_average, model, data, steps, directory, baton)


def meet(names, data, blocks, steps):
    """The wall and CPU seconds of each one's steps, block by block, without the first block."""
    turns = threading.Semaphore(0), threading.Semaphore(0)
    with tempfile.TemporaryDirectory() as directory:
        batons = [Baton(turns[i], turns[1 - i], steps) for i in range(2)]
        trainers = [
            build(name, data, steps * (blocks + 1), directory, baton) for name, baton in zip(names, batons, strict=True)
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {name: baton.blocks[1 : blocks + 1] for name, baton in zip(names, batons, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meetings", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="docs/evidence/averaging.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Tokens(1024, 64)
    load = os.getloadavg()[0]
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    step_ms = []
    for number in range(options.meetings):
        found = meet(("torch", "ours") if number % 2 == 0 else ("ours", "torch"), data, options.blocks, options.steps)
        for i, clock in enumerate(ratios):
            theirs, ours = (
                [statistics.median(duration[i] for duration in block) for block in found[name]]
                for name in ("torch", "ours")
            )
            pairs = zip(theirs, ours, strict=True)
            ratios[clock].append(math.exp(statistics.fmean(math.log(own / other) for other, own in pairs)))
        step_ms += [1000 * statistics.median(duration[1] for duration in block) for block in found["torch"]]
    record = {
        "what": "step time of AccelTrainer with ExponentialMovingAverage over Trainer with torch's AveragedModel",
        "meetings": options.meetings,
        "pairs_of_blocks": options.meetings * options.blocks,
        "steps_per_block": options.steps,
        "step_cpu_ms_median": statistics.median(step_ms),
        "interval": "95 %, Student's t over the mean log ratios of the meetings",
        **{clock: interval(values) for clock, values in ratios.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {load:.1f} at the start",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
