"""Define the commands of ``hf-accel``.  A user's mistake ends in one sentence and exit code 2."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import typer
from torch import distributed
from typer.core import TyperGroup

import hf_accel
from hf_accel.cli.compare import compare
from hf_accel.cli.doctor import doctor
from hf_accel.cli.export import export
from hf_accel.cli.find_lr import find_lr
from hf_accel.cli.plan import plan
from hf_accel.cli.run import run
from hf_accel.cli.soup import soup
from hf_accel.cli.techniques import techniques
from hf_accel.cli.train import train


class Commands(TyperGroup):
    """Report a user's mistake without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; errors that our code raises are mistakes of the user, and all others are crashes."""
        try:
            result = super().invoke(ctx)
            if distributed.is_initialized():
                distributed.destroy_process_group()  # gloo's threads abort some processes at exit otherwise
            return result
        except (ValueError, ImportError) as error:
            if not raised_here(error):
                raise
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None


def raised_here(error: BaseException) -> bool:
    """Return whether this package raised the error itself, not code that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Path(frames[-1].f_code.co_filename).is_relative_to(Path(hf_accel.__file__).parent)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train to the same quality in less time.",
)
app.command()(train)
app.command(context_settings={"allow_interspersed_args": False})(run)  # later options belong to the script
app.command()(compare)
app.command("find-lr")(find_lr)
app.command()(export)
app.command()(plan)
app.command()(soup)
app.command(context_settings={"allow_interspersed_args": False})(doctor)
app.command()(techniques)
