"""Train tiny models with a covering set of techniques and compare what came out with an earlier version of the code.

    python tests/trajectories.py --write before.json      # at one commit
    python tests/trajectories.py --compare before.json    # at another, on the same machine

Each run gives a digest of the final weights, of the losses and of the receipt without its times, on one process and on
two gloo ranks.  The digests depend on the CPU, so none of them is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():
    os.environ.setdefault(name, value)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]

from transformers import Trainer, TrainerCallback  # noqa: E402

import hf_accel  # noqa: E402
from hf_accel.recipe import find_technique  # noqa: E402
from hf_accel.testing import losses_of, tiny_trainer, weights_of  # noqa: E402

Techniques = dict[str, dict[str, Any]]

RUNS: dict[str, Techniques] = {
    "nothing": {},
    "prune, group, ramp": {
        "InfoBatch": {},
        "LengthGrouped": {},
        "BatchSizeRamp": {},
        "ExponentialMovingAverage": {"half_life": 100},
    },
    "pack": {"Packing": {}, "Cosine": {}, "GradientSpikeGuard": {}, "SequenceLengthWarmup": {}},
    "padding-free": {"PaddingFree": {}, "LAMB": {}, "TokensPerBatch": {}, "TokenCutoff": {}},
    "select within the step": {"SelectiveBackprop": {}, "GradientNoiseScale": {}, "LatestWeightAveraging": {}},
    "importance": {"ImportanceSampling": {}, "ChunkedCrossEntropy": {}, "REX": {}, "Lookahead": {}},
    "irreducible loss": {"RHOLoss": {}, "LARS": {}, "OneCycle": {}},
    "prune statically": {"ScorePruning": {}, "Deduplicate": {}, "EarlyScorePruning": {}, "StochasticDepth": {}},
    "core set": {"Coreset": {}, "WeightedSampling": {}, "MuParametrization": {"base_width": 4}},
    "curriculum": {"DifficultyCurriculum": {}, "Seesaw": {}, "SelectiveLanguageModeling": {}},
    "distill": {"Distillation": {}, "Muon": {}, "WarmupStableDecay": {}},
    "adapters": {"LoRA": {}, "LayerwiseDecay": {}, "RandomSubset": {}},
    "low rank": {"LowRankTraining": {}, "NoiseScaleRamp": {}},
    "sparse": {"SparseTraining": {}, "StochasticWeightAveraging": {}, "LinearToZero": {}},
    "drop layers": {"ProgressiveLayerDrop": {"decay": 10.0}, "LearningRateScaling": {}, "DepthScaledInit": {}},
    "freeze": {"LayerFreezing": {}, "SharpnessAware": {}, "ZeroInitResidual": {}},
    "freeze by gradients": {"hf_accel.contrib:GradientNormFreezing": {"start": 0.25, "threshold": 0.75}},
    "stack": {"ProgressiveStacking": {"start": 0.5}, "RandomSubset": {}},
    "expand": {"ExpandFrom": {"checkpoint": "hf_accel.testing:tiny_smaller"}, "Int8Training": {}},
    "drop tokens": {"RandomTokenDrop": {}, "NamedOptimizer": {}},
    "search the learning rate": {"Budget": {"limit": "12epochs"}, "LearningRateSearch": {"share": 0.75}},
    "operations": {"Budget": {"limit": "2e9flop"}, "InfoBatch": {}, "LayerFreezing": {}},
    "tokens": {"Budget": {"limit": "2000tok"}, "TargetMetric": {}, "SelectiveBackprop": {}},
    "images": {"Mixup": {}, "RandomErasing": {}, "ResolutionWarmup": {}, "ChannelsLast": {}},
    "mixed images": {"CutMix": {}, "RandAugment": {}},
    "speech": {"SpecAugment": {}, "InfoBatch": {}},
    "masked text": {"MaskRateSchedule": {}, "SparseMaskedHead": {}},
    "replaced text": {"ReplacedTokenDetection": {}, "ExponentialMovingAverage": {"half_life": 100}},
}
"""Techniques that train together, by the name of the run."""

ON_RANKS = {
    "nothing": {},
    "prune, group, ramp": RUNS["prune, group, ramp"],
    "select within the step": RUNS["select within the step"],
    "operations": RUNS["operations"],
    "seldom synchronized": {"DiLoCo": {"every": 4}, "Packing": {}},
    "compressed": {"GradientCompression": {}, "LengthGrouped": {}},
}
"""Those that train on two ranks."""


def build(techniques: Techniques) -> list[Any]:
    """Fresh techniques."""
    return [find_technique(name)(**values) for name, values in techniques.items()]


def digest(value: Any) -> str:
    """What tells a result from another one."""
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value).encode()).hexdigest()[:16]


def outcome(trainer: Any) -> dict[str, str]:
    """Digests of the weights, the losses and the receipt of a finished run."""
    weights = b"".join(
        name.encode() + value.contiguous().cpu().float().numpy().tobytes()
        for name, value in weights_of(trainer).items()
    )
    found = {"weights": digest(weights), "losses": digest(losses_of(trainer))}
    if (receipt := getattr(trainer, "receipt", None)) is not None:
        counted = ("steps", "skipped_steps", "samples", "tokens", "flops", "executed_flops", "final_learning_rate")
        numbers = {name: getattr(receipt, name) for name in (*counted, "model_flops", "progress", "budget")}
        found["receipt"] = digest([numbers, [timeless(entry["report"]) for entry in receipt.techniques]])
    return found


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what depends on the clock of the machine."""
    timed = {"seconds", "utilisation", "utilization"}
    return {name: value for name, value in report.items() if not timed & set(re.split("[_ ]", name))}


def trained(techniques: Techniques, directory: Path, **settings: Any) -> dict[str, str]:
    """The outcome of a run of `AccelTrainer`."""
    trainer = tiny_trainer(build(techniques), directory, **settings)
    trainer.train()
    return outcome(trainer)


def resumed(techniques: Techniques, directory: Path, **settings: Any) -> dict[str, str]:
    """The outcome of a run that stopped in the middle and was resumed."""
    straight = tiny_trainer(build(techniques), directory / "a", save_strategy="steps", save_steps=5, **settings)
    straight.train()
    again = tiny_trainer(build(techniques), directory / "b", **settings)
    again.train(resume_from_checkpoint=str(directory / "a" / "checkpoint-10"))
    return outcome(again)


def attached(directory: Path) -> dict[str, str]:
    """The outcome of a plain Trainer that techniques were attached to."""
    trainer = tiny_trainer([], directory, trainer_class=Trainer)
    hf_accel.attach(trainer, build({"InfoBatch": {}, "Cosine": {}}))
    trainer.train()
    return outcome(trainer)


def callbacks(directory: Path) -> dict[str, str]:
    """The outcome of a plain Trainer with techniques that are nothing but callbacks."""
    trainer = tiny_trainer([], directory, trainer_class=Trainer)
    for technique in build({"StochasticDepth": {}, "LayerFreezing": {}}):
        trainer.add_callback(technique)
    trainer.train()
    return outcome(trainer)


def accelerated(directory: Path) -> dict[str, str]:
    """The outcome of another Trainer class, and of a callback of the user's own."""

    class Halved(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs) / 2

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 17

    trainer = tiny_trainer(build({"RandomSubset": {}}), directory, trainer_class=hf_accel.accelerated(Halved))
    trainer.add_callback(Stops())
    trainer.train()
    return outcome(trainer)


def on_one_process(only: Sequence[str]) -> dict[str, Any]:
    """All outcomes of one process, by run."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 9}
    resumable = {
        name: RUNS[name] for name in ("prune, group, ramp", "stack", "sparse", "distill", "search the learning rate")
    }
    runs: dict[str, Callable[[Path], Any]] = {
        **{name: lambda place, t=techniques: trained(t, place) for name, techniques in RUNS.items()},
        **{f"resume: {name}": lambda place, t=techniques: resumed(t, place) for name, techniques in resumable.items()},
        "resume: micro-batches": lambda place: resumed(RUNS["importance"], place, micro_batch_size=3),
        "evaluate": lambda place: trained(RUNS["prune, group, ramp"], place, **evaluated),
        "keep the best": lambda place: trained(
            RUNS["sparse"], place, save_strategy="steps", save_steps=9, load_best_model_at_end=True, **evaluated
        ),
        "attached": attached,
        "callbacks": callbacks,
        "accelerated": accelerated,
    }
    found = {}
    for name, run in runs.items():
        if only and not any(part in name for part in only):
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                found[name] = run(Path(place))
            except ValueError as error:
                found[name] = {"refused": type(error).__name__}
                print(f"{name}: {error}", file=sys.stderr)
    return found


def on_two_ranks(only: Sequence[str]) -> dict[str, Any]:
    """All outcomes of two ranks, by run."""
    from ranks import run_on_ranks

    def runs() -> dict[str, Any]:
        found = {}
        for name, techniques in ON_RANKS.items():
            if not only or any(part in name for part in only):
                settings: Any = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
                found[name] = trained(techniques, Path(shared, digest(name)), **settings)
        return found

    with tempfile.TemporaryDirectory() as shared:
        results = run_on_ranks(runs, timeout=500)
    return {f"{name}, rank {rank}": found for rank, of_rank in enumerate(results) for name, found in of_rank.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="where to write the outcomes")
    parser.add_argument("--compare", type=Path, help="outcomes to compare with")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of runs")
    parser.add_argument("--one-process", action="store_true", help="leave the two ranks out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = on_one_process(options.only)
    if not options.one_process:
        found |= on_two_ranks(options.only)
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if options.compare is None:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(options.compare.read_text())
    differing = [name for name, result in found.items() if before.get(name) != result]
    for name in differing:
        print(f"{name}: {before.get(name)} became {found[name]}")
    print(f"{len(found) - len(differing)} of {len(found)} runs are identical.")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
