"""``hf-accel doctor``: find lost time of a training run, ways to save it, traps, and mistakes in settings."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from transformers import Trainer, set_seed

from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task
from hf_accel.tools.doctor import Examination, Finding, examine, instead_of_training
from hf_accel.tools.lint import lint
from hf_accel.tools.run_script import run_script


def doctor(
    target: Annotated[Path, typer.Argument(help="A script, a recipe, or a config of DeepSpeed or accelerate.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the script.")] = None,
) -> None:
    """Show where a training run spends its time, and how to save some of it."""
    if not target.is_file():
        raise ValueError(f"target({str(target)!r}): there is no such file. Give a script, a recipe or a configuration.")
    console = Console()
    if target.suffix == ".py":
        examined: list[Examination] = []
        with instead_of_training(lambda trainer: examined.append(examine(trainer))):
            run_script(target, arguments or [])
        if not examined:
            raise ValueError(f"target({str(target)!r}): it never called Trainer.train(). Give a script that trains.")
        if not dist.is_initialized() or dist.get_rank() == 0:
            show(console, examined[0])
    elif target.suffix == ".json" or "distributed_type" in target.read_text(errors="replace"):
        mistakes = lint(target)
        for sentence in mistakes:
            console.print(f"- {sentence}", markup=False, highlight=False)
        console.print(f"{len(mistakes)} found." if mistakes else "Nothing found.")
        raise typer.Exit(1 if mistakes else 0)
    else:
        show(console, examine_recipe(Recipe.load(target)))


def examine_recipe(recipe: Recipe) -> Examination:
    """Examine a short run of a recipe; its budget tells the length of the whole run."""
    built = recipe.build_techniques()
    techniques = [t for t in built if "budget" not in t.implemented_hooks()]
    limits = next((t.budget().amounts for t in built if "budget" in t.implemented_hooks()), None)
    with tempfile.TemporaryDirectory() as folder:
        args: Any = recipe.with_changes(f"args.output_dir={folder}").training_arguments()
        set_seed(args.seed)
        return examine(Trainer(args=args, **build_task(recipe)), techniques, limits)


def show(console: Console, found: Examination) -> None:
    """Print an examination as tables."""
    total = sum(found.seconds.values()) or 1.0
    where = Table(title="Where a step's time goes", title_justify="left")
    where.add_column("phase")
    where.add_column("ms", justify="right")
    where.add_column("share", justify="right")
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        if seconds / total >= 0.005:
            where.add_row(
                "Trainer and Python" if name == "other" else name, f"{1000 * seconds:.1f}", f"{seconds / total:.0%}"
            )
    console.print(where)
    if found.run_seconds is not None:
        console.print(f"The whole run would take about {found.run_seconds:,.0f} s on this machine.", highlight=False)
    listed(console, "Ways to save time", found.findings)
    listed(console, "Traps", found.traps)
    if not found.findings and not found.traps:
        console.print("Nothing stands out.")


def listed(console: Console, title: str, findings: list[Finding]) -> None:
    """Print findings as a numbered table."""
    if not findings:
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("", justify="right")
    table.add_column("found", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    table.add_column("saves", justify="right")
    for number, finding in enumerate(findings, 1):
        saving = "?" if finding.saving is None else f"~{finding.saving:.0%}"
        table.add_row(str(number), finding.what, finding.remedy, saving)
    console.print(table)
