"""``hf-accel soup``: average several models that were fine-tuned from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import Trainer, set_seed
from transformers.utils import logging

from hf_accel.metrics import greater_is_better
from hf_accel.recipe import Recipe


def soup(
    folders: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="Models or LoRA adapters.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    greedy: Annotated[bool, typer.Option("--greedy", help="Keep only models that help; needs --recipe.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with the validation set for --greedy.")] = None,
    metric: Annotated[str, typer.Option(help="Metric of the evaluation, such as loss or accuracy.")] = "loss",
    declared: Annotated[
        bool | None,
        typer.Option("--greater-is-better/--lower-is-better", help="Direction of a metric that declares none."),
    ] = None,
) -> None:
    """Average the weights of models, or of LoRA adapters, exactly."""
    from hf_accel.tools import soup as soups

    if greedy != (recipe is not None):
        raise ValueError("soup: --greedy and --recipe need each other. Give both or neither.")
    refuse_full(out)
    logging.disable_progress_bar()
    console, kept = Console(), list(dict.fromkeys(folders))
    if recipe is not None:
        more_is_better = greater_is_better(metric, declared)
        evaluate = evaluation(Recipe.load(recipe), metric)
        scores = {folder: evaluate(folder) for folder in kept}
        kept, score = soups.greedy(scores, evaluate, lower_is_better=not more_is_better)
        table = Table(title=f"Greedy soup: {metric} {score:.6g}", title_justify="left")
        for heading in ("model", metric, "kept"):
            table.add_column(heading, overflow="fold")
        for folder, value in scores.items():
            table.add_row(str(folder), f"{value:.6g}", "yes" if folder in kept else "no")
        console.print(table)
    soups.soup(kept, out)
    console.print(f"The mean of {len(kept)} is in {out}.", highlight=False, soft_wrap=True)


def refuse_full(out: Path) -> None:
    """Raise ValueError if a path exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out({str(out)!r}): exists and is not an empty folder. Choose another --out.")


def evaluation(recipe: Recipe, metric: str) -> Callable[[Path], float]:
    """Return a function that evaluates the model of a folder on a recipe's validation set."""
    from hf_accel.tasks import build_task
    from hf_accel.tools.soup import is_adapter, load_model

    recipe.args |= {"report_to": "none", "disable_tqdm": True}
    args = recipe.training_arguments()
    set_seed(args.seed)
    task = build_task(recipe)
    base = task.pop("model")

    def evaluate(folder: Path) -> float:
        model: Any
        if is_adapter(folder):
            from peft import PeftModel

            model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        else:
            model = load_model(folder)
        metrics = Trainer(model=model, args=args, **task).evaluate()
        if f"eval_{metric}" not in metrics:
            shown = ", ".join(sorted(name.removeprefix("eval_") for name in metrics))
            raise ValueError(f"metric({metric!r}): the evaluation does not report it. Choose one of {shown}.")
        return metrics[f"eval_{metric}"]

    return evaluate
