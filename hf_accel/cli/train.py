"""``hf-accel train``: train a recipe, or without one a small Llama on data that every machine has."""

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
    recipe: Annotated[Path | None, typer.Argument(help="YAML file. Default: train a small Llama.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as args.seed=1."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Limit of the run: 30min, 3epochs, 1e9tok, 50kJ, job.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of checkpoints, model and receipt.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's newest checkpoint.")] = False,
    previous: Annotated[
        Path | None, typer.Option("--continue", help="Extend the run in this folder, for example by --budget +30min.")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the techniques differ.")
    ] = False,
) -> None:
    """Train a recipe, and print a receipt."""
    chosen = Recipe.load(recipe or DEFAULT).with_changes(*(changes or ()))
    if budget is not None:
        chosen = chosen.with_changes(f"budget={budget}")
    if output is not None:
        chosen.args["output_dir"] = str(output)
    args = chosen.training_arguments()
    techniques = chosen.build_techniques()  # fails on a mistake before data is read
    if previous is not None and not any("budget" in t.implemented_hooks() and t.budget().extends for t in techniques):
        raise ValueError(f"continue({str(previous)!r}) needs a budget that extends the run. Add --budget +30min.")
    if previous is not None and resume:
        raise ValueError("resume: --resume is for an interrupted run, --continue for a finished one. Remove one.")
    folder = Path(str(args.output_dir))
    if resume and not checkpoints(folder):
        raise ValueError(f"output({str(folder)!r}): there is no checkpoint to resume from. Remove --resume.")
    if not resume:
        refuse_to_overwrite(folder, "Choose" if previous else "Add --resume to continue, or choose")
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # otherwise torch warns in every epoch
    set_seed(args.seed)
    trainer = AccelTrainer(args=args, recipe=chosen, allow_changes=allow_changes, **build_task(chosen))
    logging.disable_progress_bar()  # one bar is enough
    with progress_bar(trainer):
        trainer.train(resume_from_checkpoint=resume or (previous and str(previous)))
    trainer.save_model()
    if trainer.is_world_process_zero():
        assert trainer.receipt is not None
        console = Console()
        console.print(trainer.receipt.table())
        console.print(f"Model, recipe and receipt are in {folder}.")


def refuse_to_overwrite(folder: Path, remedy: str) -> None:
    """Raise ValueError if the folder holds files of an earlier run; ``remedy`` begins the advice."""
    left = [*checkpoints(folder), *sorted(folder.glob("*.safetensors")), *folder.glob("receipt.json")]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output({str(folder)!r}): is a file. Choose another --output.")
    if left:
        raise ValueError(f"output({str(folder)!r}): holds {left[0].name} of an earlier run. {remedy} another --output.")
