"""Tunes the baselines of workloads, and writes the records that comparisons take them from.

    python benchmarks/tune_baselines.py code-lm novels-lm ... [--trials 20] [--seeds 4] [--data FOLDER]

The standard deviation between seeds, half of which is the margin of non-inferiority, is of seeds that neither the
tuning nor a comparison uses.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hf_accel.compare import Comparison
from hf_accel.compare.tuning import SEED, SPACE
from hf_accel.compare.workloads.workload import DATA_ROOT, TUNED

FIRST_SEED = 2001


def tune(name: str, trials: int, seeds: int, out: Path) -> dict:
    """The record of one workload."""
    comparison = Comparison(
        [],
        workload=name,
        tune=trials,
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
        horizons=(0.05, 1.0),
        placebos=False,
        out=out / name,
    )
    results = comparison.run(
        lambda progress: print(name, f"{progress.done}/{progress.total}", progress.last, flush=True)
    )
    found = results.row("baseline")
    made = results.trials["baseline"]
    chosen = {key: results.baseline_args[key] for key in made[0] if key in results.baseline_args}
    start = {key: made[0][key] for key in chosen}
    return {
        "args": chosen,
        "tuned": f"{len(made)} trials of {SPACE} ({start}), seed {SEED}, {results.date}",
        "seed_sigma": float(f"{found.quality_sd:.4g}"),
        "quality": float(f"{found.quality:.5g}"),
        "seeds": results.seeds,
        "metric": results.metric,
        "machine": results.machine,
        "versions": results.versions,
        "trials": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--data", default=os.environ.get(DATA_ROOT, "data"))
    parser.add_argument("--out", type=Path, default=Path("accel_output/tuning"))
    options = parser.parse_args()
    os.environ[DATA_ROOT] = options.data
    for name in options.workloads:
        record = tune(name, options.trials, options.seeds, options.out)
        TUNED.mkdir(exist_ok=True)
        (TUNED / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, record["args"], record["seed_sigma"])


if __name__ == "__main__":
    main()
