"""A learning rate that decays linearly to zero against a cosine: the same steps, at three horizons.

    python benchmarks/linear_to_zero.py novels-lm sst2 --data DATA [--out FOLDER] [--record FILE]

Both arms have the workload's tuned arguments, of which the schedule is linear; the peak was tuned with it, which may
favor it, so that the grade of neither is touched.  What is recorded is the difference of the losses of the same seeds
(cosine minus linear), with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from hf_accel.compare.comparison import Arm, Comparison
from hf_accel.compare.statistics import mean_interval
from hf_accel.compare.workloads import DATA_ROOT
from hf_accel.recipe import Recipe

HORIZONS = (0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("accel_output", "linear-to-zero"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.data is not None:
        os.environ[DATA_ROOT] = str(options.data)
    runs, findings = {}, []
    for name in options.workloads:
        arms = [Arm(f"cosine {h:g}", Recipe(args={"lr_scheduler_type": "cosine"}), horizon=h) for h in HORIZONS]
        comparison = Comparison(
            arms,
            name,
            horizons=HORIZONS,
            seeds=options.seeds,
            placebos=False,
            out=options.out / name,
            slots=options.slots,
        )
        assert comparison.reference.recipe.args["lr_scheduler_type"] == "linear"
        document = comparison.run().to_dict()
        losses = {(run["arm"], run["horizon"], run["seed"]): run["metrics"]["eval_loss"] for run in document["runs"]}
        runs[name], said = {}, []
        for h in HORIZONS:
            linear = [losses["baseline", h, seed] for seed in document["seeds"]]
            cosine = [losses[f"cosine {h:g}", h, seed] for seed in document["seeds"]]
            mean, low, high = mean_interval([c - z for c, z in zip(cosine, linear, strict=True)])
            runs[name][f"{h:g}"] = {"linear": linear, "cosine": cosine, "difference": mean, "low": low, "high": high}
            said.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] at {h:g} of the budget")
        text = f"eval_loss of a cosine minus that of the linear decay, the same steps: {', '.join(said)}"
        print(f"{name}: {text}", flush=True)
        findings += [
            {"technique": technique, "workload": name, "text": text, "gained": None}
            for technique in ("Cosine", "LinearToZero")
        ]
    if options.record is not None:
        record = {
            "seeds": document["seeds"],
            "machine": document["machine"],
            "date": document["date"],
            "findings": findings,
            "runs": runs,
        }
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
