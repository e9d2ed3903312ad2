"""``hf-accel compare``: measure how many times faster recipes reach the quality of a fair baseline, with intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from hf_accel.compare import Progress


def compare(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE", help="YAML files, or techniques as 'InfoBatch(keep=0.5)'."),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Workload of the comparison. Default: task, model and data of the recipe.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Recipe that replaces the workload's tuned baseline.")] = None,
    horizons: Annotated[str, typer.Option(help="Horizons of the baseline, as shares of the budget.")] = (
        "0.25,0.5,0.75,1,1.5"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 5,
    budget: Annotated[str | None, typer.Option(help="Time for the whole comparison, such as 20min.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric of the evaluation, such as loss or accuracy.")] = None,
    greater_is_better: Annotated[
        bool | None,
        typer.Option("--greater-is-better/--lower-is-better", help="Direction of a metric that declares none."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of records and reports. An interrupted comparison resumes there."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the workloads' data sets.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="File of the record, such as docs/evidence/NAME.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also run the recipe without each technique.")] = False,
    placebos: Annotated[bool, typer.Option(help="Run placebos beside the candidates.")] = True,
    share: Annotated[float, typer.Option(help="Horizon of the candidates, as a share of the budget.")] = 1.0,
    scale: Annotated[str, typer.Option(help="Scale of the workload: cpu or gpu.")] = "cpu",
    tune: Annotated[
        int, typer.Option(min=0, help="Trials of Trainer's free options per arm; 10 or more count as tuning.")
    ] = 0,
) -> None:
    """Measure the speed-up of recipes at equal quality, against a fair baseline."""
    from hf_accel.compare import Comparison, write_record
    from hf_accel.compare.report import table
    from hf_accel.compare.workloads import DATA_ROOT

    if data is not None:
        os.environ[DATA_ROOT] = str(data)
    comparison = Comparison(
        recipes or [],
        workload=workload,
        baseline=baseline,
        horizons=_numbers(horizons),
        seeds=seeds,
        metric=metric,
        greater_is_better=greater_is_better,
        budget=budget,
        out=out,
        ablate=ablate,
        placebos=placebos,
        tune=tune,
        scale=scale,
        share=share,
    )
    with progress_bar(Console(stderr=True)) as follow:
        results = comparison.run(follow)
    if record is not None:
        write_record(results, record)
    if as_json:
        print(json.dumps(results.to_dict()))
        return
    console = Console()
    console.print(table(results))
    console.print(f"Records, report.md and report.html are in {comparison.out}.")


@contextmanager
def progress_bar(console: Console) -> Iterator:
    """Show finished runs, elapsed time and, after the first run, the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, TextColumn("{task.fields[left]}"), console=console) as bar:
        task = bar.add_task("starting", total=None, left="")

        def follow(progress: Progress) -> None:
            left = "" if progress.seconds_left is None else f"about {_duration(progress.seconds_left)} left"
            bar.update(task, description="runs", completed=progress.done, total=progress.total, left=left)
            if progress.last:
                bar.print(f"{progress.done}/{progress.total}  {progress.last}  {left}", highlight=False)

        yield follow


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"horizons({text!r}): must be numbers. Write, for example, 0.25,0.5,0.75,1,1.5.") from None
