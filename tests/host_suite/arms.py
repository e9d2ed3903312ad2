"""Replace `transformers.Trainer` by the arm in HF_ACCEL_HOST_ARM; a pytest plugin for Transformers' own tests."""

import copy
import dataclasses
import json
import os
import sys
from typing import Any, ClassVar

import stand_ins
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_accel import BatchSizeRamp, Budget, ExponentialMovingAverage, GradientSpikeGuard, RandomSubset
from hf_accel.technique import Technique
from hf_accel.trainer import accelerated


@dataclasses.dataclass(eq=False)
class Identity(Technique):
    """Return from each hook what it was given."""

    fidelity: ClassVar = "exact"

    def prepare_dataset(self, dataset):
        return dataset

    def prepare_model(self, model):
        return model

    def transform_batch(self, batch):
        return batch


def streamed(args) -> dict[str, Any]:
    return {"micro_batch_size": "auto" if args.auto_find_batch_size else args.per_device_train_batch_size}


def budgeted(args) -> dict[str, Any]:
    """Move the length of the run from the arguments, which would be a second budget, to a technique."""
    limit = f"{args.max_steps}steps" if args.max_steps > 0 else f"{args.num_train_epochs}epochs"
    args.max_steps = -1
    return {"techniques": [Budget(limit)]}


def neutral(args) -> dict[str, Any]:
    kinds = RandomSubset, BatchSizeRamp, GradientSpikeGuard, ExponentialMovingAverage
    return {"techniques": [Identity(), *(kind(**kind.neutral) for kind in kinds)]}


REMOVED_NAMES = "GlueDataset", "GlueDataTrainingArguments"
"""Names that tests of another version import; the tests that use them fail in every arm."""

ARMS = {"plain": lambda args: {}, "stream": streamed, "budget": budgeted, "neutral": neutral}


def arm_of(trainer_class: type, default: type, options) -> type:
    """Return the trainer with the options that an arm adds for given arguments, or for the default ones."""

    class Arm(accelerated(trainer_class)):
        def __init__(self, model=None, args=None, *positional, **kwargs):
            args = copy.copy(args or default("tmp_trainer"))
            super().__init__(model, args, *positional, **kwargs, **options(args))

    return Arm


def pytest_configure(config):
    stand_ins.install()
    host: Any = sys.modules["transformers"]  # which its own import may replace
    for name in REMOVED_NAMES:
        if not hasattr(host, name):
            setattr(host, name, None)
    arm = os.environ["HF_ACCEL_HOST_ARM"]
    if arm != "trainer":
        host.Trainer = arm_of(Trainer, TrainingArguments, ARMS[arm])
        host.Seq2SeqTrainer = arm_of(Seq2SeqTrainer, Seq2SeqTrainingArguments, ARMS[arm])


OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    """Note the outcome of a test; a failure in its setup or teardown counts."""
    name = report.nodeid.removeprefix("tests/trainer/")
    if report.when == "call" or report.outcome != "passed":
        if OUTCOMES.get(name, {}).get("outcome") != "failed":
            error = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            OUTCOMES[name] = {"outcome": report.outcome, "error": error}


def pytest_unconfigure(config):
    print("\nOUTCOMES", json.dumps(OUTCOMES))
