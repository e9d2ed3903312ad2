"""Train a copy of a trainer's model with another learning rate and a shorter horizon.

A short run uses the trainer's data, loss, optimizer, schedule, techniques and seed, and the current weights of its
model.  Warm-up and decay lie inside the short horizon.  The trainer, its model and the global random generators do not
change.  A short run drops techniques that prepare the training set, because it is prepared already.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_accel.clock import Limits
from hf_accel.engine.engine import Engine
from hf_accel.engine.setup import hide_run
from hf_accel.host.internals import unwrap_forward
from hf_accel.preserve import keyed_random, random_state_kept
from hf_accel.stream.reader import CopyingCollator
from hf_accel.technique import SLOTS, Diverged, Technique

QUIET = {
    "eval_strategy": IntervalStrategy.NO,
    "eval_on_start": False,
    "save_strategy": SaveStrategy.NO,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "dataloader_persistent_workers": False,
    "enable_jit_checkpoint": False,
}


@dataclass(eq=False)
class Horizon(Technique):
    """Limit a short run, per unit of the clock."""

    limits: Mapping[str, float] = field(default_factory=lambda: {"steps": 1.0})

    def budget(self) -> Limits:
        return Limits(self.limits)


@dataclass
class ShortRun:
    """The result of a short run.

    Args:
        loss: Evaluation loss; NaN without an evaluation, infinite if a technique gave up the run.
        losses: Training loss of each step, if requested; the last is infinite if a technique gave up the run.
        steps: Number of updates.
        spent: Amounts that the clock counted, per unit.
        step_seconds: Seconds of a step, averaged over about the last ten.
        evaluated: Number of examples in the evaluation.
        evaluation_seconds: Seconds of the evaluation.
        flops: Operations of training by Trainer's rule, without the evaluation.
    """

    loss: float
    losses: list[float]
    steps: int
    spent: dict[str, float]
    step_seconds: float
    evaluated: int
    evaluation_seconds: float
    flops: float


def short_run(
    engine: Engine,
    learning_rate: float,
    limits: Mapping[str, float],
    *,
    techniques: Sequence[Technique] = (),
    without: Sequence[Technique] = (),
    each_step: bool = False,
    warmup: float | None = None,
    probe: Any = None,
) -> ShortRun:
    """Train a copy of a trainer's model, and evaluate it.

    Args:
        engine: Engine of the trainer, before or at the start of its own training.
        learning_rate: Peak learning rate.
        limits: Limits, per unit of the clock.
        techniques: Additional techniques; they replace the trainer's techniques that own the same slots.
        without: The trainer's techniques that the short run drops as well.
        each_step: True to record the loss of every step.
        warmup: Replacement for ``warmup_steps``; None to keep it.
        probe: Examples to evaluate; None to skip the evaluation.
    """
    with tempfile.TemporaryDirectory() as directory, _shared_state_kept(engine):
        changes = QUIET | {"learning_rate": learning_rate, "output_dir": directory, "logging_steps": 1}
        changes["logging_strategy"] = IntervalStrategy.STEPS if each_step else IntervalStrategy.NO
        if warmup is not None:
            changes["warmup_steps"] = warmup
        trainer: Any = _twin(engine, [Horizon(limits), *techniques], without, changes)
        set_seed(engine.host.args.seed)
        loss, given_up = float("nan"), []
        try:
            trainer.train()
        except Diverged:
            loss, given_up, probe = float("inf"), [float("inf")], None
        if probe is not None:
            loss = _evaluation_loss(trainer, probe)
        return ShortRun(
            loss=loss,
            losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + given_up,
            steps=max(trainer.state.global_step, 1),
            spent=dict(trainer.clock.spent),
            step_seconds=trainer.clock.step_seconds,
            evaluated=0 if probe is None else len(probe),
            evaluation_seconds=0.0 if probe is None else trainer.accel.meter.evaluation_seconds,
            flops=trainer.state.total_flos,
        )


@contextlib.contextmanager
def many_runs() -> Iterator[None]:
    """Freeze existing objects around short runs, so that each garbage collection skips the objects of all imports."""
    frozen = gc.get_freeze_count() > 0
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def probe_of(engine: Engine, examples: int) -> Any:
    """Return a fixed sample of the evaluation set, or of the training set if there is no evaluation set."""
    host = engine.host
    data = host.train_dataset if host.eval_dataset is None else host.eval_dataset
    data = next(iter(data.values())) if isinstance(data, dict) else data
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        return list(itertools.islice(data, examples))
    shuffled_N = torch.randperm(len(data), generator=torch.Generator().manual_seed(host.args.seed))
    ids = shuffled_N[:examples].sort().values.tolist()
    return data.select(ids) if isinstance(data, datasets.Dataset) else Subset(data, ids)


def _evaluation_loss(trainer: Any, probe: Any) -> float:
    metrics = trainer.evaluate(probe)
    if "eval_loss" not in metrics:
        raise ValueError("eval_dataset needs labels for a loss. Add a column of labels.")
    return metrics["eval_loss"]


def _twin(engine: Engine, techniques: Sequence[Technique], without: Sequence[Technique], changes: Mapping) -> Any:
    """Return a trainer of a copy of the model, with its own engine and copies of the techniques."""
    if engine.ranks.world_size > 1:
        _ = engine.ranks.cpu_group  # one for all copies
    taken = {slot for technique in techniques for slot in technique.implemented_hooks() & set(SLOTS)}
    left_out = {*taken, "prepare_dataset"}
    own = [t for t in engine.roster.techniques if t not in without and not t.implemented_hooks() & left_out]
    fresh = [*techniques, *map(copy.copy, own)]  # copies keep their knowledge of the prepared model
    hide_run(fresh)  # the run that the copies were made from
    twin = engine.host.twin(_copy_of_model(engine.host.model))
    twin.data_collator = CopyingCollator(twin.data_collator)
    for name, value in changes.items():
        setattr(twin.args, name, value)
    options = dataclasses.replace(engine.options, allow_changes=False, async_checkpoints=False)
    twin.accel = Engine(twin, fresh, options, gauges=engine.gauges, streamed=engine.roster.streamed, paced=True)
    twin.accel.accumulation_steps = engine.accumulation_steps
    twin.accel.ranks.cpu_group = engine.ranks.cpu_group if engine.ranks.world_size > 1 else None
    twin.accel.meter.clock.now = engine.meter.clock.now
    for technique in fresh:
        twin.add_callback(technique)
    twin.create_accelerator_and_postprocess()
    twin.accel.settle(model_is_prepared=True)
    return twin


def _copy_of_model(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    unwrap_forward(copied)
    copied._forward_pre_hooks.clear()  # watchers of the model must not see passes of the copy
    copied._forward_hooks.clear()
    return copied


@contextlib.contextmanager
def _shared_state_kept(engine: Engine) -> Iterator[None]:
    """Restore the state that copies share with the trainer: random generators and accelerate's gradient state."""
    shared = engine.host.accelerator.gradient_state
    loaders, synchronized = shared.dataloader_references, shared.sync_gradients
    with keyed_random(), random_state_kept(engine.host.args.device):
        try:
            yield
        finally:
            shared.dataloader_references = loaders
            shared.sync_gradients = synchronized
