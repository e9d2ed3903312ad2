"""``hf-accel train``: trains what a recipe says, or without one a small Llama on data that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import set_seed
from transformers.utils import logging

from hf_accel.checkpoints.format import checkpoints
from hf_accel.cli.progress import progress_bar
from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task
from hf_accel.trainer import AccelTrainer

DEFAULT = Path(__file__).with_name("default.yaml")


def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; without one, a small Llama is trained.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, as args.seed=1."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="What may be spent: 30min, 3epochs, 1e9tok, 50kJ, job.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of checkpoints, model and receipt.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    going_on: Annotated[
        Path | None, typer.Option("--continue", help="Go on with the run in this folder, for --budget +30min more.")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although the techniques differ.")
    ] = False,
) -> None:
    """Train a recipe, and end with a receipt."""
    chosen = Recipe.load(recipe or DEFAULT).with_changes(*(changes or ()))
    if budget is not None:
        chosen = chosen.with_changes(f"budget={budget}")
    if output is not None:
        chosen.args["output_dir"] = str(output)
    args = chosen.training_arguments()
    techniques = chosen.build_techniques()  # a mistake shows before any data are read
    if going_on is not None and not any(
        "budget" in t.implemented_hooks() and t.extends_previous_run() for t in techniques
    ):
        raise ValueError(f"continue({str(going_on)!r}): how much more may be spent? Say it, as --budget +30min.")
    if going_on is not None and resume:
        raise ValueError("resume: an interrupted run is resumed without --continue. Leave one of the two out.")
    folder = Path(str(args.output_dir))
    if resume and not checkpoints(folder):
        raise ValueError(f"output({str(folder)!r}): there is no checkpoint to resume from. Leave --resume out.")
    if not resume:
        refuse_to_overwrite(folder, "Choose" if going_on else "Add --resume to go on, or choose")
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at every epoch
    set_seed(args.seed)
    trainer = AccelTrainer(args=args, recipe=chosen, allow_changes=allow_changes, **build_task(chosen))
    logging.disable_progress_bar()  # one bar is enough
    with progress_bar(trainer):
        trainer.train(resume_from_checkpoint=resume or (going_on and str(going_on)))
    trainer.save_model()
    if trainer.is_world_process_zero():
        assert trainer.receipt is not None
        console = Console()
        console.print(trainer.receipt.table())
        console.print(f"Model, recipe and receipt are in {folder}.")


def refuse_to_overwrite(folder: Path, remedy: str) -> None:
    """Raise ValueError where a run has left something that this one would replace; ``remedy`` is what to do."""
    left = [*checkpoints(folder), *sorted(folder.glob("*.safetensors")), *folder.glob("receipt.json")]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output({str(folder)!r}): is a file. Choose another --output.")
    if left:
        raise ValueError(f"output({str(folder)!r}): holds {left[0].name} of an earlier run. {remedy} another --output.")
