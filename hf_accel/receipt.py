"""Record the costs of a run by phase, and the work and the cost of each technique."""

from __future__ import annotations

import json
import platform
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving")


class Stopwatch:
    """Measure seconds by name, exclusively: while an inner name is charged, the outer one is not.

    It does not wait for an accelerator: a name is charged until its work is launched.  The first name that waits is
    charged for the wait.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._names: list[str] = []
        self._since = 0.0
        self.synchronizes = False  # if True, wait for the accelerator, to charge a phase for its work, not its launch

    def charge(self, name: str) -> Charge:
        """Charge the code inside to a name."""
        return Charge(self, name)

    def begin(self, name: str) -> None:
        """Charge a name from now on, until it ends."""
        self.settle()
        self._names.append(name)

    def end(self) -> None:
        """Charge the outer name again."""
        self.settle()
        self._names.pop()

    def settle(self) -> None:
        """Charge the time until now."""
        if self.synchronizes and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._names:
            name = self._names[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class Charge:
    """Charge the code inside to a name; a class, because a generator takes twice as long, many times per step."""

    __slots__ = ("name", "stopwatch")

    def __init__(self, stopwatch: Stopwatch, name: str):
        self.stopwatch, self.name = stopwatch, name

    def __enter__(self) -> None:
        self.stopwatch.begin(self.name)

    def __exit__(self, *error: object) -> None:
        self.stopwatch.end()


@dataclass
class Receipt:
    """The costs of a finished run.

    Args:
        seconds: Wall seconds by phase of this process since it last entered ``train()``; ``other`` is the rest.  On an
            accelerator, seconds until work is launched; the phase that needs a result first waits for it.
        wall_seconds: Wall seconds of the whole run, with its earlier parts.
        steps: Optimizer updates.
        skipped_steps: Updates that a technique refused (spikes) or the loss scaler of fp16 skipped.
        samples: Examples trained on, over all ranks.
        tokens: Tokens trained on without padding, over all ranks; 0 if the input has none.
        flops: Floating-point operations by the rule 6 x parameters x input positions, with padding.
        executed_flops: Operations that ran, over all ranks, if they were counted.
        model_flops: Executed operations that the model needs, without recomputation.
        joules: Energy, over all ranks, if it was measured.
        peak_memory_bytes: Largest memory of this process: on the accelerator if there is one, else resident.
        techniques: Configuration, seconds in hooks and report of each technique.
    """

    seconds: dict[str, float]
    wall_seconds: float
    steps: int
    skipped_steps: int
    samples: float
    tokens: float
    flops: float
    peak_memory_bytes: int
    world_size: int
    device: str
    final_learning_rate: float
    progress: float
    executed_flops: float | None = None
    model_flops: float | None = None
    joules: float | None = None
    budget: dict[str, float] = field(default_factory=dict)
    techniques: list[dict[str, Any]] = field(default_factory=list)

    @property
    def samples_per_second(self) -> float:
        """Return the examples per second of the whole run."""
        return self.samples / max(self.wall_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second of the whole run."""
        return self.tokens / max(self.wall_seconds, 1e-9)

    def cost(self, price_per_hour: float) -> float:
        """Return the cost of the run on a machine with this price."""
        return self.wall_seconds / 3600 * price_per_hour

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in ``receipt.json``."""
        rates = {"samples_per_second": self.samples_per_second, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | rates

    def save(self, path: str | Path) -> None:
        """Write ``receipt.json``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        """Return the table as text, for ``print(trainer.receipt)``."""
        console = Console(width=100)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()

    def table(self) -> Group:
        """Format the receipt for the terminal."""
        spent = Table(title="Receipt", show_header=False, title_justify="left")
        spent.add_column(style="bold")
        spent.add_column(justify="right")
        budget = ", ".join(f"{amount:g} {unit}" for unit, amount in self.budget.items())
        rows = [
            ("budget", budget or "none"),
            ("wall time", f"{self.wall_seconds:.1f} s"),
            ("steps", f"{self.steps:,}" + (f" ({self.skipped_steps:,} skipped)" if self.skipped_steps else "")),
            ("samples", f"{self.samples:,.0f}  ({self.samples_per_second:,.0f}/s)"),
            ("tokens", f"{self.tokens:,.0f}  ({self.tokens_per_second:,.0f}/s)"),
            ("FLOPs (6ND)", f"{self.flops:.3g}"),
            ("peak memory", f"{self.peak_memory_bytes / 2**20:,.0f} MiB"),
            ("final learning rate", f"{self.final_learning_rate:.3g}"),
            ("device", f"{self.device} x {self.world_size}"),
        ]
        measured = [
            ("FLOPs executed", self.executed_flops),
            ("FLOPs of the model", self.model_flops),
            ("joules", self.joules),
        ]
        for name, value in [*rows, *((name, f"{value:.4g}") for name, value in measured if value is not None)]:
            spent.add_row(name, value)
        where = Table(title="Where the time went", title_justify="left")
        where.add_column("phase")
        where.add_column("seconds", justify="right")
        where.add_column("share", justify="right")
        total = max(sum(self.seconds.values()), 1e-9)
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            where.add_row(name.partition(".")[2] or name, f"{seconds:.2f}", f"{seconds / total:.1%}")
        parts: list[Table] = [spent, where]
        if self.techniques:
            reports = Table(title="Techniques", title_justify="left")
            reports.add_column("technique", overflow="fold")
            reports.add_column("seconds", justify="right")
            reports.add_column("report")
            for technique in self.techniques:
                report = ", ".join(f"{k} {_short(v)}" for k, v in technique["report"].items())
                reports.add_row(technique["technique"], f"{technique['seconds']:.2f}", report or "-")
            parts.append(reports)
        return Group(*parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory in use since the process (CPU: resident) or the run (accelerator: allocated) began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
