"""Keeps Trainer's own notion of time in step with the clock: epochs, the live estimate of ``max_steps``, fractions of
progress at which to log, evaluate and save, and the seconds kept back for the end of the run.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import _is_peft_model
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_accel.clock import CONTINUOUS, passes
from hf_accel.stream import keyed_random

if TYPE_CHECKING:
    from hf_accel.trainer import AccelTrainerMixin

BEAT_SECONDS = 2.0
"""How often the seconds spent are written down."""
STEADY = 5
"""The first step whose pace is one to compare others with."""


class Pacer(TrainerCallback):
    """First among the callbacks, so that all others see the right epoch and end."""

    def __init__(self, trainer: AccelTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.fired_at = trainer.clock.progress
        self.last_beat = float("-inf")
        self.timed = any(unit in trainer.clock.limits for unit in CONTINUOUS)
        if self.timed:
            self.ending = Ending(trainer)
            trainer.clock.reserve = self.ending.seconds()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.stopwatch.begin("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.stopwatch.end()
        self.trainer.count_step()

    def on_step_end(self, args, state, control, **kwargs):
        trainer, clock = self.trainer, self.trainer.clock
        if trainer.stream is not None:
            state.epoch = trainer.stream.epochs
            control.should_epoch_stop |= trainer.stream.epoch_is_over
        if trainer.paced:
            self._pace(args, state, control)
        if self.timed:
            clock.reserve = self.ending.seconds()
            if state.is_world_process_zero and clock.seconds - self.last_beat > BEAT_SECONDS:
                self.last_beat = clock.seconds
                trainer.beat()
        return control

    def _pace(self, args, state, control) -> None:
        progress, clock = self.trainer.clock.progress, self.trainer.clock
        if clock.done:
            state.max_steps = state.global_step
        elif progress > 0:
            state.max_steps = max(round(state.global_step / progress), state.global_step + 1)
        for kind, flag in (("logging", "should_log"), ("eval", "should_evaluate"), ("save", "should_save")):
            share = getattr(args, f"{kind}_steps") or 0
            strategy = getattr(args, f"{kind}_strategy")
            delayed = kind == "eval" and state.global_step < args.eval_delay
            if 0 < share < 1 and strategy == "steps" and not delayed and passes(self.fired_at, progress, share):
                setattr(control, flag, True)
        self.fired_at = progress
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = state.max_steps


class Terminator(TrainerCallback):
    """Saves and stops at the end of the step in which SIGTERM came, where ``enable_jit_checkpoint`` asks for it.

    Trainer's own callback, whose place it takes, saves in the middle of a step, when the step's examples count as
    trained on and the update is still to come.
    """

    def __init__(self, trainer: AccelTrainerMixin, replaced: JITCheckpointCallback):
        assert replaced.jit_manager is not None
        self.trainer, self.asked = trainer, False
        signal.signal(signal.SIGTERM, replaced.jit_manager._original_sigterm_handler)

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked = False
        self.before = signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "asked", True))

    def on_step_end(self, args, state, control, **kwargs):
        (asked,) = self.trainer._share([float(self.asked)])  # ranks do not hear of it in the same step
        if asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)


class Restorer(TrainerCallback):
    """Last among the callbacks: techniques get their state after their own ``on_train_begin``, and what all others
    want to be evaluated is left out where it would make the run late."""

    def __init__(self, trainer: AccelTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_techniques()
        self.trainer.fit_memory()

    def on_step_end(self, args, state, control, **kwargs):
        clock = self.trainer.clock
        timed = any(unit in clock.limits for unit in CONTINUOUS)
        if timed and control.should_evaluate and not clock.done:
            control.should_evaluate = clock.has_time_for(clock.evaluation_seconds)

    on_epoch_end = on_step_end


class Ending:
    """What follows the last update in a run that ends on time: an evaluation and a checkpoint.

    Measured: first from a few batches and from the size of the model, then from every evaluation and checkpoint.  The
    evaluation is scaled by how much longer a position of a step takes now than when it was measured, for a machine
    that gets other work will evaluate as slowly as it trains.
    """

    def __init__(self, trainer: AccelTrainerMixin):
        self.trainer = trainer
        self.steps, self.positions = 0, 0.0
        self.pace_when_measured = 0.0
        self.measured: float | None = None
        self.evaluates = str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) != "no"
        self.saves = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) != "no"
        trainer.evaluation_seconds = probe_evaluation(trainer) if self.evaluates else 0.0
        trainer.saving_seconds = _guess_saving(trainer) if self.saves else 0.0

    def seconds(self) -> float:
        """The reserve: what is kept back of the budget."""
        trainer = self.trainer
        seconds = trainer.evaluation_seconds * self._slowdown() if self.evaluates else 0.0
        trainer.clock.evaluation_seconds = seconds
        if self.saves:
            seconds += trainer.saving_seconds * (2 if trainer.args.load_best_model_at_end else 1)
        return seconds + 0.05

    def _slowdown(self) -> float:
        """Seconds of a position now over those when the evaluation was measured; both about of the last ten steps.

        1 until the fifth step, for the first ones load and compile.
        """
        trainer, duration = self.trainer, self.trainer.clock.step_seconds
        if duration == 0 or trainer._trained_positions == 0:
            return 1.0
        self.positions += (trainer._trained_positions - self.positions) * (0.1 if self.positions else 1.0)
        self.steps += 1
        if self.steps < STEADY:
            return 1.0
        pace = duration / self.positions
        if self.measured != trainer.evaluation_seconds:
            self.measured, self.pace_when_measured = trainer.evaluation_seconds, pace
        return min(max(pace / self.pace_when_measured, 0.5), 4.0)


def probe_evaluation(trainer: AccelTrainerMixin) -> float:
    """Seconds of one evaluation, from the duration of a few of its batches."""
    data = trainer.eval_dataset
    parts: list[Any] = list(data.values()) if isinstance(data, dict) else [data]
    seconds = 0.0
    for dataset in parts:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            continue  # an unmeasurable stream of examples: the first evaluation will tell
        size = trainer.args.eval_batch_size
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="evaluation")
        few = Subset(dataset, range(min(len(dataset), 3 * size)))
        trainer.model.eval()
        with keyed_random():
            durations = []
            for inputs in DataLoader(few, batch_size=size, collate_fn=collate):
                began = trainer.clock.now()
                trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                durations.append(trainer.clock.now() - began)
        batches = -(-len(dataset) // (size * trainer.args.world_size))
        seconds += batches * min(durations)
    return seconds


def _guess_saving(trainer: AccelTrainerMixin) -> float:
    """Seconds of one checkpoint on a disk that writes 300 MB a second: of the weights, or of adapters alone, and of two
    moments of what is trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in trainer.model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    weights = trained if _is_peft_model(trainer.model) else sum(size for size, _ in sizes)
    return 0.1 + (weights + 2 * trained) / 300e6
