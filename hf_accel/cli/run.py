"""``hf-accel run``: run an unmodified script with techniques attached to the trainers that it builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_accel.recipe import Recipe
from hf_accel.tools.run_script import attached, run_script, with_options


def run(
    script: Annotated[Path, typer.Argument(help="A Python script that trains with a Trainer.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the script.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with args, budget and techniques.")] = None,
    technique: Annotated[
        list[str] | None, typer.Option(metavar="TECHNIQUE", help="Technique in Python syntax: InfoBatch(keep=0.5).")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Limit of the run: 30min, 500steps, 3epochs, 1e9tok.")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the techniques differ.")
    ] = False,
) -> None:
    """Run an unmodified script with techniques attached."""
    if not script.is_file():
        raise ValueError(f"script({str(script)!r}): there is no such file. Check the path.")
    sys.path[0] = str(script.resolve().parent)  # as Python does; custom techniques may be there
    chosen = Recipe() if recipe is None else Recipe.load(recipe)
    chosen = with_options(chosen, technique or [], budget)
    with attached(chosen, allow_changes=allow_changes):
        run_script(script, arguments or [])
