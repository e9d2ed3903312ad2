"""Show a progress bar with the spent share of the budget, whatever its unit, and the logged values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import ProgressCallback, Trainer, TrainerCallback


class _Bar(TrainerCallback):
    """Show budget progress, because Trainer's bar needs a number of steps that a budget may not have."""

    def __init__(self, trainer: Any, bar: Progress) -> None:
        self.trainer, self.bar = trainer, bar
        self.task = bar.add_task("step 0", total=1.0)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=self.trainer.clock.progress, description=f"step {state.global_step:,}")

    def on_log(self, args, state, control, logs, **kwargs):
        names = ("loss", "learning_rate", "train_loss", *(name for name in logs if name.startswith("eval_")))
        values = [f"{name} {_short(logs[name])}" for name in names if name in logs and not name.endswith("_per_second")]
        self.bar.print(f"step {state.global_step:>7,}  ", "  ".join(values), highlight=False)


@contextmanager
def progress_bar(trainer: Trainer) -> Iterator[None]:
    """Show the progress of training inside, unless the arguments disable it."""
    if trainer.args.disable_tqdm or not trainer.is_world_process_zero():
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn())
    trainer.remove_callback(ProgressCallback)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        trainer.add_callback(_Bar(trainer, bar))
        yield


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
