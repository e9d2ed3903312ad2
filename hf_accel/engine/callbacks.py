"""Keep Trainer's own notion of time in step with the clock.

The callbacks set epochs, the live estimate of ``max_steps``, and the progress at which to log, evaluate and save.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_accel.clock import CONTINUOUS, passes
from hf_accel.engine.checkpoints import RunCheckpoints
from hf_accel.engine.meter import Meter
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.reserve import EndReserve
from hf_accel.engine.roster import Roster
from hf_accel.host.internals import sigterm_handler_before
from hf_accel.host.view import TrainerView
from hf_accel.technique import Technique

BEAT_SECONDS = 2.0
"""Interval between two records of the seconds spent."""


class TimedRun(Protocol):
    """The part of the engine that callbacks use; each ``train()`` has a new meter and stream."""

    host: TrainerView
    roster: Roster
    ranks: Ranks
    meter: Meter
    checkpoints: RunCheckpoints

    @property
    def stream(self) -> Any:
        """Return the stream of the run."""

    def end_step(self) -> None:
        """Advance the clock by the cost of the step."""

    def fit_memory(self) -> None:
        """Find the largest micro-batch that fits into memory."""


class ClockCallback(TrainerCallback):
    """Update Trainer's time before all other callbacks, so that they see the right epoch and end."""

    def __init__(self, run: TimedRun):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        clock = self.run.meter.clock
        self.fired_at = clock.progress
        self.last_beat = float("-inf")
        self.timed = any(unit in clock.limits for unit in CONTINUOUS)
        if self.timed:
            self.reserve = EndReserve(self.run.host, self.run.meter)
            clock.reserve = self.reserve.seconds()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.run.meter.stopwatch.begin("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.run.meter.stopwatch.end()
        self.run.end_step()

    def on_step_end(self, args, state, control, **kwargs):
        run, clock = self.run, self.run.meter.clock
        if run.stream is not None:
            state.epoch = run.stream.epochs
            control.should_epoch_stop |= run.stream.epoch_is_over
        if run.roster.paced:
            self._pace(args, state, control)
        if self.timed:
            clock.reserve = self.reserve.seconds()
            if state.is_world_process_zero and clock.seconds - self.last_beat > BEAT_SECONDS:
                self.last_beat = clock.seconds
                run.checkpoints.beat()
        return control

    def _pace(self, args, state, control) -> None:
        clock = self.run.meter.clock
        progress = clock.progress
        if clock.done:
            state.max_steps = state.global_step
        elif progress > 0:
            state.max_steps = max(round(state.global_step / progress), state.global_step + 1)
        if progress > 0:
            state.num_train_epochs = math.ceil(state.epoch / min(progress, 1.0))
        for kind, flag in (("logging", "should_log"), ("eval", "should_evaluate"), ("save", "should_save")):
            share = getattr(args, f"{kind}_steps") or 0
            strategy = getattr(args, f"{kind}_strategy")
            delayed = kind == "eval" and state.global_step < args.eval_delay
            if 0 < share < 1 and strategy == "steps" and not delayed and passes(self.fired_at, progress, share):
                setattr(control, flag, True)
        self.fired_at = progress
        for callback in self.run.host.callback_handler.callbacks:
            for name in ("training_bar", "training_tracker"):  # of terminals and notebooks
                if (bar := getattr(callback, name, None)) is not None:
                    bar.total = state.max_steps


class SigtermCallback(JITCheckpointCallback):
    """Save and stop at the end of the step in which SIGTERM arrives, if ``enable_jit_checkpoint`` is set.

    It replaces Trainer's own callback, which saves in the middle of a step.  The step's examples then count as trained
    on, but the update is still missing.
    """

    def __init__(self, ranks: Ranks, replaced: JITCheckpointCallback):
        super().__init__()
        self.ranks, self.trainer, self.jit_manager = ranks, replaced.trainer, replaced.jit_manager
        signal.signal(signal.SIGTERM, sigterm_handler_before(replaced))

    def on_train_begin(self, args, state, control, **kwargs):
        manager = self.jit_manager
        manager.is_checkpoint_requested = False
        self.before = signal.signal(
            signal.SIGTERM, lambda number, frame: setattr(manager, "is_checkpoint_requested", True)
        )

    on_step_begin = on_pre_optimizer_step = on_epoch_end = TrainerCallback.on_step_begin

    def on_step_end(self, args, state, control, **kwargs):
        asked = float(self.jit_manager.is_checkpoint_requested)
        if self.ranks.share([asked])[0]:  # ranks may receive the signal in different steps
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)


class RestoreCallback(TrainerCallback):
    """Run after all other callbacks: restore techniques, and skip evaluations that would overrun the budget."""

    def __init__(self, run: TimedRun):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.checkpoints.restore_techniques()
        self.run.fit_memory()

    def on_step_end(self, args, state, control, **kwargs):
        clock = self.run.meter.clock
        timed = any(unit in clock.limits for unit in CONTINUOUS)
        if timed and control.should_evaluate and not clock.done:
            control.should_evaluate = clock.has_time_for(clock.evaluation_seconds)

    on_epoch_end = on_step_end


GIVEN_TO_CALLBACKS = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
"""Keyword arguments from Trainer's callback handler, beside arguments, state and control."""


def _listens(callback: TrainerCallback, event: str) -> bool:
    return getattr(type(callback), event) is not getattr(TrainerCallback, event, None)


class _Told:
    """Stand for a technique in the list of a handler of another library, which may give callbacks other things."""

    def __init__(self, technique: Technique, tell: Callable[..., Any]):
        self.technique, self.tell = technique, tell

    def __getattr__(self, event: str) -> Callable[..., Any]:
        return lambda args, state, control, **kwargs: self.tell(self.technique, control)


def charge_events(handler: Any, host: TrainerView, first: TrainerCallback, last: TrainerCallback) -> None:
    """Let a callback handler charge each technique for its events.

    ``first`` and ``last`` surround the callbacks of each event, but are not in Trainer's list.  An own ``call_event``
    of the handler calls the other callbacks.
    """
    kind: Any = type(handler)
    own = vars(handler).pop("call_event", None) or (
        None if kind.call_event is CallbackHandler.call_event else kind.call_event.__get__(handler)
    )

    class ChargingHandler(kind):
        def call_event(self, event, args, state, control, **kwargs):
            given: dict[str, Any] = {name: getattr(self, name) for name in GIVEN_TO_CALLBACKS}
            given |= {"model": host.model} | kwargs

            def tell(callback: Any, control: Any) -> Any:
                charged = isinstance(callback, Technique) and callback.run_ is not None
                with callback.run_.charge(callback) if charged else contextlib.nullcontext():
                    return getattr(callback, event)(args, state, control, **given) or control

            control = tell(first, control)
            if own is not None:
                self.callbacks[:] = [_Told(c, tell) if isinstance(c, Technique) else c for c in self.callbacks]
                try:
                    control = own(event, args, state, control, **kwargs)
                finally:
                    self.callbacks[:] = [c.technique if isinstance(c, _Told) else c for c in self.callbacks]
            elif any(isinstance(c, Technique) and _listens(c, event) for c in self.callbacks):
                for callback in self.callbacks:  # a callback may change the list, as in Trainer
                    control = tell(callback, control)
            else:
                control = super().call_event(event, args, state, control, **kwargs)
            return tell(last, control)

    handler.__class__ = ChargingHandler
