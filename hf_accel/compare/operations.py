"""Counts a run's operations in forks of its process, so that the run pays nothing and computes the same bits.

Before a step of a new kind, a fork of the process makes that step, counts it, reports and ends; then the process makes
it.  The first update of each kind, and all work before the first step (scoring passes, a teacher's training), are
counted the same way.  Forks cannot use an accelerator.  There, only steps are counted, where they run, and only if
operations are the cost of the comparison.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_accel.meters.flops import Counting, FlopMeter, Flops, Result
from hf_accel.trainer import AccelTrainerMixin


class FirstStep(BaseException):
    """Ends a fork at the first step."""


class Operations(TrainerCallback, FlopMeter):
    """Counts what a trainer computes within ``train()``, without evaluations; adds itself to the trainer's callbacks.

    Args:
        on_accelerator: Count steps on an accelerator, too, which makes them slower.

    Attributes:
        executed: Operations that ran; nan if a kernel has no formula, or nothing is counted.
        spent: Wall and CPU seconds of the counting, which the run is not charged for.
    """

    def __init__(self, trainer: Trainer, *, on_accelerator: bool = False) -> None:
        super().__init__()
        self.executed = 0.0
        self.spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self._updates: dict[Hashable, float] = {}
        self._in_fork = self._began = False
        self._charge: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
        if torch.accelerator.is_available() and not on_accelerator:
            self.executed = math.nan
            return
        trainer.add_callback(self)
        if isinstance(trainer, AccelTrainerMixin):
            engine = trainer.accel
            engine.gauges = {**(engine.gauges or {}), "flops": self}
            trainer.clock.now = self.now
            self._charge = lambda name: engine.meter.stopwatch.charge(name)
        else:
            step: Callable = trainer.training_step

            def training_step(model, inputs, *args, **kwargs):
                return self.measure(model, inputs, lambda: step(model, inputs, *args, **kwargs))[0]

            trainer.training_step = training_step

    def now(self) -> float:
        """Return the time without the counting."""
        return time.monotonic() - self.spent["wall_seconds"]

    def train(self, trainer: Trainer) -> None:
        """Count what comes before the first step, then train."""
        if isinstance(trainer, AccelTrainerMixin) and trainer.techniques and not torch.accelerator.is_available():
            self.executed += self._ahead(trainer.train).executed
        trainer.train()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self._in_fork:
            raise FirstStep
        if not self._began and not torch.accelerator.is_available():
            own: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            own.register_step_pre_hook(self._before_update)
        self._began = True

    def measure(
        self, model: nn.Module, inputs: Any, run: Callable[[], Result], varied: Hashable = None
    ) -> tuple[Result, Flops]:
        result, flops = super().measure(model, inputs, run, varied)
        self.executed += flops.executed
        return result, flops

    def count(self, run: Callable[[], Result]) -> tuple[Result, Flops]:
        if torch.accelerator.is_available():
            return super().count(run)
        flops = self._ahead(run)
        return run(), flops

    def _before_update(self, optimizer, args, kwargs) -> None:
        if self._in_fork:
            return
        kind = tuple(p.grad is None for group in optimizer.param_groups for p in group["params"])
        if kind not in self._updates:
            self._updates[kind] = self._ahead(lambda: optimizer.step(*args[1:], **kwargs)).executed
        self.executed += self._updates[kind]

    def _ahead(self, run: Callable[[], Any]) -> Flops:
        """Count in a fork what this process will do next; within a fork, only do it."""
        if self._in_fork:
            run()
            return Flops()
        with self._charge("counting"):
            began = time.perf_counter(), time.process_time()
            reading, writing = os.pipe()
            if (child := os.fork()) == 0:
                self._report(run, writing)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                told = pipe.read()
            usage = os.wait4(child, 0)[2]
            self.spent["wall_seconds"] += time.perf_counter() - began[0]
            self.spent["cpu_seconds"] += time.process_time() - began[1] + usage.ru_utime + usage.ru_stime
        return Flops(*json.loads(told)) if told else Flops(math.nan, math.nan)

    def _report(self, run: Callable[[], Any], writing: int) -> None:
        """Run, report, and end the fork."""
        self._in_fork = True
        try:
            with Counting() as counting:
                try:
                    run()
                except FirstStep:
                    pass
            os.write(writing, json.dumps(counting.flops).encode())
        except Exception as error:
            print(f"Operations are not counted: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
