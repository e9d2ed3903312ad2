"""Keeps Trainer's own notion of time in step with the clock: epochs, the live estimate of ``max_steps``, fractions of
progress at which to log, evaluate and save, and the seconds kept back for the end of the run.
"""

from __future__ import annotations

import signal
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_accel.clock import CONTINUOUS, passes
from hf_accel.engine.reserve import EndReserve

BEAT_SECONDS = 2.0
"""How often the seconds spent are written down."""


class ClockCallback(TrainerCallback):
    """First among the callbacks, so that all others see the right epoch and end."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.fired_at = trainer.clock.progress
        self.last_beat = float("-inf")
        self.timed = any(unit in trainer.clock.limits for unit in CONTINUOUS)
        if self.timed:
            self.ending = EndReserve(trainer)
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


class SigtermCallback(TrainerCallback):
    """Saves and stops at the end of the step in which SIGTERM came, where ``enable_jit_checkpoint`` asks for it.

    Trainer's own callback, whose place it takes, saves in the middle of a step, when the step's examples count as
    trained on and the update is still to come.
    """

    def __init__(self, trainer: Any, replaced: JITCheckpointCallback):
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


class RestoreCallback(TrainerCallback):
    """Last among the callbacks: techniques get their state after their own ``on_train_begin``, and what all others
    want to be evaluated is left out where it would make the run late."""

    def __init__(self, trainer: Any):
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
