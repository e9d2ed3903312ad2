"""The operations of a run, counted in forks of its process: no arm pays for the count, and no bit of it changes.

Where a step of a new kind comes, a fork of the process makes it, counted, reports and ends; then the process makes it
itself.  So are the first update of each kind, and all that is done before the first step: passes that score, a teacher
that is trained.  An accelerator cannot be used in a fork: there, nothing is counted but where operations are what is
compared; then steps are, where they run, and nothing else.
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
    """Ends what a fork does when the first step begins."""


class Operations(TrainerCallback, FlopMeter):
    """Counts what a trainer, whose callback it becomes, computes between ``train()`` and its end, without evaluations.

    Args:
        on_accelerator: Whether steps are counted on an accelerator, too, though they take longer so.

    Attributes:
        executed: Operations that ran; nan where a kernel has no formula, or nothing is counted.
        spent: Wall and CPU seconds of the counting, which are not the run's.
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
            trainer.meters = {**trainer.meters, "flops": self}
            trainer.clock.now = self.now
            self._charge = trainer.stopwatch.charge
        else:
            step: Callable = trainer.training_step

            def training_step(model, inputs, *args, **kwargs):
                return self.measure(model, inputs, lambda: step(model, inputs, *args, **kwargs))[0]

            trainer.training_step = training_step

    def now(self) -> float:
        """Seconds that pass for the run."""
        return time.monotonic() - self.spent["wall_seconds"]

    def train(self, trainer: Trainer) -> None:
        """Train; what comes before the first step is counted beforehand."""
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
        """The operations of what this process will do next, counted in a fork; in one, none are counted anew."""
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
        """Run and report, in the fork, and end it."""
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
