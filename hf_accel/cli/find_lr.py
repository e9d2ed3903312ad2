"""``hf-accel find-lr``: find the peak learning rate of a recipe, or of a workload's baseline, by short runs."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from hf_accel.optim.learning_rate import find_lr as search
from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task
from hf_accel.trainer import AccelTrainer

if TYPE_CHECKING:
    from hf_accel.updates.learning_rates import FoundRate


def find_lr(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file of the run.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as args.seed=1.")
    ] = None,
    workload: Annotated[str | None, typer.Option(help="Task, model, data and baseline of a workload.")] = None,
    budget: Annotated[str | None, typer.Option(help="Limit of the run: 30min, 500steps, 3epochs.")] = None,
    share: Annotated[float, typer.Option(help="Largest cost of the search, in runs of that length.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Folder of find-lr.json and find-lr.png.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the workloads' data sets.")] = None,
    plot: Annotated[bool, typer.Option(help="Draw the range test and the sweep.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Propose a peak learning rate: run a range test, then short runs, and train the best ones for longer."""
    if recipe is None and workload is None:
        raise ValueError("find-lr needs a recipe or a workload. Name one.")
    if plot:
        _need_matplotlib()
    chosen = (Recipe() if recipe is None else Recipe.load(recipe)).with_changes(*(changes or ()))
    if budget is not None:
        chosen = chosen.with_changes(f"budget={budget}")
    if data is not None:
        from hf_accel.compare.workloads import DATA_ROOT

        os.environ[DATA_ROOT] = str(data)
    folder = out or Path("accel_output", f"find-lr-{workload or recipe.stem}")  # type: ignore[union-attr]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out({str(folder)!r}): is a file. Choose another --out.")
    logging.set_verbosity_error()
    log = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = of_recipe(chosen, scratch) if workload is None else of_workload(workload, chosen, scratch)
        found = search(trainer, share=share, follow=lambda line: log.print(line, highlight=False))
    if not trainer.is_world_process_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / "find-lr.json")
    if plot:
        found.plot(folder / "find-lr.png")
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console = Console()
    console.print(table(found))
    console.print(f"Proposed: args.learning_rate={found.learning_rate:g}. Losses and plot are in {folder}.")


def table(found: FoundRate) -> Table:
    """Show the loss by learning rate and round, and the cost of the search."""
    shown = Table(title="Loss after short runs, by share of the horizon", title_justify="left")
    shown.add_column("learning rate", justify="right")
    for round_ in found.rounds:
        shown.add_column(f"{round_['share']:.2g}", justify="right")
    for rate in sorted({rate for round_ in found.rounds for rate in round_["losses"]}):
        losses = [round_["losses"].get(rate) for round_ in found.rounds]
        style = "bold green" if rate == found.learning_rate else None
        shown.add_row(f"{rate:g}", *("" if loss is None else f"{loss:.4f}" for loss in losses), style=style)
    shown.caption = (
        f"{found.runs} short runs: {found.cost:.2f} of the cost of the run, {found.steps:,} updates on "
        f"{found.samples:,.0f} samples, {found.flops:.3g} FLOPs, {found.seconds:.0f} s. "
        f"The learning rate was {found.given:g}."
    )
    return shown


def of_recipe(recipe: Recipe, scratch: str) -> Any:
    """Build the trainer of a recipe."""
    args = recipe.training_arguments()
    recipe.build_techniques()  # fails on a mistake before data is read
    args.output_dir, args.report_to, args.disable_tqdm = scratch, [], True
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    set_seed(args.seed)
    trainer = AccelTrainer(args=args, techniques=recipe.build_techniques(), **build_task(recipe))
    trainer.pop_callback(PrinterCallback)
    return trainer


def of_workload(name: str, recipe: Recipe, scratch: str) -> Any:
    """Build the trainer of a workload's baseline with the arguments, techniques and budget of a recipe."""
    from hf_accel.compare import Comparison, build_workload
    from hf_accel.compare.worker import HARNESS, make_trainer

    workload = build_workload(name)
    if (problem := workload.missing()) is not None:
        raise ValueError(problem)
    given = Recipe(args=recipe.args, techniques=recipe.techniques)
    arm = Comparison([given], workload=workload).arms[0]
    budget = recipe.budget or workload.nominal_budget()
    if not isinstance(budget, str):
        raise ValueError(f"budget({budget!r}): find-lr on a workload needs exactly one budget. Pass --budget once.")
    args = arm.recipe.args | {"output_dir": scratch} | HARNESS
    set_seed(int(args.get("seed", 42)))
    return make_trainer(workload.build(), args, arm.recipe, budget, TrainerCallback(), hosted=True)


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "find-lr: the plot needs matplotlib. Install it with: pip install 'hf-accel[compare]', or add --no-plot."
        )
