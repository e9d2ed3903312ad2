"""Watch some steps of a run: their seconds, their padding, and the lines that wait for a value."""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_accel.technique import Technique

WARM = 5
"""Steps before the measurement."""
STEPS = 25
"""Measured steps."""


@dataclass(eq=False)
class Watch(Technique):
    """Measure steps: their phases, the padding of their batches, and the lines that wait for a number."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.positions_, self.padding_ = 0, 0
        self.lengths_: list[list[int]] = []
        self.waits_: Counter[str] = Counter()
        self.hook_ = model.register_forward_pre_hook(self._look, with_kwargs=True)
        self.mode_ = contextlib.ExitStack()
        self.before_: dict[str, float] = {}
        self.steps_: list[float] = []
        self.began_ = time.perf_counter()
        self.run_.stopwatch.synchronizes = True  # type: ignore[union-attr]

    def on_step_begin(self, args, state, control, **kwargs):
        run: Any = self.run_
        self.mode_.close()
        if state.global_step == 1:
            self.mode_.enter_context(Waits(self.waits_))
        now = time.perf_counter()
        if state.global_step > WARM:
            self.steps_.append(now - self.began_)
        elif state.global_step == WARM:
            self.before_ = dict(run.stopwatch.seconds)
        self.began_ = now

    def on_train_end(self, args, state, control, **kwargs):
        run: Any = self.run_
        self.hook_.remove()
        self.mode_.close()
        steps = max(state.global_step - WARM, 1)
        run.stopwatch.settle()
        run.stopwatch.synchronizes = False
        self.seconds_ = {
            name.partition(".")[2] or name: (seconds - self.before_.get(name, 0.0)) / steps
            for name, seconds in run.stopwatch.seconds.items()
        }

    def _look(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        if module.training and mask is not None and mask.dim() == 2:
            self.positions_ += mask.numel()
            self.padding_ += int((mask == 0).sum())
            self.lengths_.append(mask.sum(1).tolist())

    @property
    def padding(self) -> float:
        """Return the share of the positions that are padding."""
        return self.padding_ / self.positions_ if self.positions_ else 0.0

    @property
    def padding_when_grouped(self) -> float:
        """Return the share of padding if examples of similar length shared a batch."""
        lengths = sorted(itertools.chain.from_iterable(self.lengths_))
        sizes = [len(batch) for batch in self.lengths_]
        batches = [lengths[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
        return 1 - sum(lengths) / max(sum(len(batch) * max(batch) for batch in batches), 1)


class Waits(TorchDispatchMode):
    """Count the reads of tensor values by line of the user's code."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found[_line_of_the_user()] += 1
        return func(*args, **(kwargs or {}))


def _line_of_the_user() -> str:
    """Return the line that reads a value; empty if an installed package does, such as Trainer, or `Watch`."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == Path(__file__) and frame.name == Watch._look.__name__:
            return ""
        if path == Path(__file__) or path.is_relative_to(Path(torch.__file__).parent):
            continue
        return "" if "site-packages" in path.parts else f"{path.name}:{frame.lineno}"
    return ""
