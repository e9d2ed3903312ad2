"""``hf-accel plan``: predict the memory of each device, choose a setting that fits, and fit a run into a budget."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from hf_accel.cli.find_lr import of_recipe
from hf_accel.optim.learning_rate.learning_rate_scaling import rate_factor
from hf_accel.optim.learning_rate.learning_rate_search import LearningRateSearch
from hf_accel.recipe import Recipe
from hf_accel.tools.calibration import Forecast, calibrate
from hf_accel.tools.planning import KEPT_BACK, Footprint, Planner, Setting, parse_bytes, write_configs
from hf_accel.tools.subjects import subject_of

WAYS = {
    (False, False): "all weights",
    (False, True): "+ check-\npointing",
    (True, False): "LoRA",
    (True, True): "LoRA + ch.",
}
"""Column headings by the use of adapters and of activation checkpointing."""


def plan(
    model: Annotated[str, typer.Argument(help="Folder or config.json of a model, name on the Hub, or recipe.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices of the machine.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of each device, such as 80GB or 24GiB.")] = "80GB",
    length: Annotated[int | None, typer.Option(min=2, help="Positions per example.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples per forward pass on a device.")] = None,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = True,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    budget: Annotated[
        str | None, typer.Option(help="Run a trial of a recipe to predict the work in 2h, or the time of 3epochs.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the configuration files.")] = Path("accel_plan"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show which settings fit on the devices, recommend one, and write its configuration files."""
    limit = parse_bytes(memory)
    if budget is not None and Path(model).suffix not in (".yaml", ".yml"):
        raise ValueError(f"budget({budget!r}) needs the data of a recipe, and {model} is not a recipe. Give a recipe.")
    if budget is not None:
        Recipe.load(model).with_changes(f"budget={budget}").build_techniques()  # fails early on a mistake
    if output.exists() and not output.is_dir():
        raise ValueError(f"output({str(output)!r}): is a file. Choose another --output.")
    subject = subject_of(model, rows=batch, length=length)
    planner = Planner(subject, devices=devices, bf16=bf16, lora_rank=lora_rank)
    settings = list(planner.settings())
    chosen = planner.recommend(limit, settings)
    written = [] if chosen is None else write_configs(output, chosen, devices, bf16)
    timed = None if budget is None else what_fits(Recipe.load(model), budget, subject.rows, devices)
    if as_json:
        _print_json(planner, settings, chosen, limit, timed)
        raise typer.Exit(0 if chosen is not None else 1)
    console = Console()
    examples = f"{subject.rows} images" if subject.length is None else f"{subject.rows} x {subject.length} tokens"
    console.print(f"[bold]{subject.name}[/]: {examples} a device, {devices} x {memory}, AdamW", highlight=False)
    if timed is not None:
        console.print(schedule(timed, budget))
    console.print(totals(planner, settings, limit))
    shown = chosen or min(settings, key=lambda setting: planner.footprint(setting).device)
    console.print(parts(planner, settings, shown, console.width))
    if not any(setting.lora for setting in settings):
        hint = "LoRA needs peft, which is not installed. Install it with: pip install 'hf-accel[peft]'."
        console.print(hint, markup=False, highlight=False)
    if chosen is None:
        smallest = planner.footprint(shown).device
        console.print(
            f"Nothing fits: the smallest setting ({shown}) needs {_gigabytes(smallest)} of {_gigabytes(limit)} GB. "
            "Lower --batch or --length, or add devices.",
            highlight=False,
        )
        raise typer.Exit(1)
    console.print(advice(planner, chosen, limit, written), highlight=False)


CALIBRATION_SECONDS = 30.0
"""Seconds of the timed short run, without evaluations of some batches and copies of the model."""


def what_fits(recipe: Recipe, budget: str, rows: int, devices: int) -> dict[str, Any]:
    """Predict steps, data, learning rate and seconds of a run by a trial on this machine in one process."""
    tuned_for = int(recipe.args.get("per_device_train_batch_size", 8))
    chosen = recipe.with_changes(f"budget={budget}", f"args.per_device_train_batch_size={rows}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = of_recipe(chosen, scratch)
        searches = [t for t in trainer.techniques if isinstance(t, LearningRateSearch)]
        forecast = calibrate(trainer, seconds=CALIBRATION_SECONDS, without=searches)
        left = 1 - sum(search.share for search in searches)
        limits = {unit: limit * left for unit, limit in trainer.accel.limits().amounts.items()}
    for strategy, rhythm in (("eval", forecast.evaluations), ("save", forecast.checkpoints)):
        if getattr(trainer.args, f"{strategy}_strategy") == "epoch":
            rhythm.each_step *= devices
    forecast.evaluation /= devices
    forecast.spent = {unit: spent * (1 if unit == "steps" else devices) for unit, spent in forecast.spent.items()}
    steps = forecast.steps(limits)
    rule = "linear" if "sgd" in trainer.args.optim else "sqrt"
    kappa = rows * devices / tuned_for
    return {
        "steps": steps,
        **{unit: steps * forecast.spent[unit] for unit in ("epochs", "samples", "tokens")},
        "batch": forecast.batch * devices,
        "rule": rule,
        "times_the_batch": kappa,
        "learning_rate": trainer.args.learning_rate * rate_factor(kappa, rule),
        "seconds": forecast.seconds(steps),
        "forecast": forecast,
    }


def schedule(timed: dict[str, Any], budget: str | None) -> Table:
    """Show the work that fits in a budget."""
    forecast: Forecast = timed["forecast"]
    table = Table(title=f"Work within {budget}", title_justify="left", show_header=False, caption_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("updates", f"{timed['steps']:,}")
    for unit in ("epochs", "samples", "tokens"):
        if timed[unit]:
            table.add_row(unit, f"{timed[unit]:,.3g}" if unit == "epochs" else f"{timed[unit]:,.0f}")
    table.add_row("examples per update", f"{timed['batch']:,}")
    scaled = (
        "" if timed["times_the_batch"] == 1 else f" ({timed['rule']} rule, {timed['times_the_batch']:g} x the batch)"
    )
    table.add_row("peak learning rate", f"{timed['learning_rate']:.3g}{scaled}")
    table.add_row("duration", _duration(timed["seconds"]))
    parts = (
        ("updates", timed["steps"], 1.0, forecast.step),
        ("evaluations", forecast.evaluations.once, forecast.evaluations.each_step, forecast.evaluation),
        ("checkpoints", forecast.checkpoints.once, forecast.checkpoints.each_step, forecast.checkpoint),
    )
    for name, once, each_step, seconds in parts:
        times = once if name == "updates" else once + each_step * timed["steps"]
        if times and seconds:
            table.add_row(f"  of {name}", f"{times:,.0f} x {seconds:.3g} s")
    table.caption = (
        f"Measured on {forecast.measured_steps:,} updates on this machine in one process, in {forecast.cost:.0f} s. "
        "Other devices differ."
    )
    return table


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def totals(planner: Planner, settings: list[Setting], limit: float) -> Table:
    """Show the memory of a device by engine, adapters and activation checkpointing."""
    table = Table(title="GB per device", title_justify="left", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    ways = sorted({(s.lora, s.checkpointing) for s in settings})
    for way in ways:
        table.add_column(WAYS[way], justify="right")
    for engine in dict.fromkeys(s.engine for s in settings):
        cells = []
        for lora, checkpointing in ways:
            size = planner.footprint(Setting(engine, checkpointing, lora)).device
            fits = size <= limit * (1 - KEPT_BACK)
            cells.append(f"[green]{_gigabytes(size)} yes[/]" if fits else f"[red]{_gigabytes(size)}  no[/]")
        table.add_row(engine, *cells)
    table.caption = f"yes: fits, with {KEPT_BACK:.0%} of a device reserved for its allocator and context."
    return table


def parts(planner: Planner, settings: list[Setting], shown: Setting, width: int) -> Table:
    """Show the use of memory by engine for the options of one setting; on a narrow terminal, only for its engine."""
    way = "LoRA" if shown.lora else "all weights"
    way += ", activation checkpointing" if shown.checkpointing else ""
    table = Table(title=f"Use of the memory in GB ({way})", title_justify="left", caption_justify="left")
    table.add_column("")
    engines = dict.fromkeys(s.engine for s in settings if width >= 80 or s.engine == shown.engine)
    for engine in engines:
        table.add_column(engine.replace("-", "\n"), justify="right", style="bold" if engine == shown.engine else None)
    found = [planner.footprint(Setting(engine, shown.checkpointing, shown.lora)) for engine in engines]
    for name in Footprint._fields:
        table.add_row(name, *(_gigabytes(size) if (size := getattr(f, name)) else "-" for f in found))
    table.caption = "At the peak: gradients grow while activations shrink. Buffers: gathered or sent tensors."
    return table


def advice(planner: Planner, chosen: Setting, limit: float, written: list[Path]) -> str:
    """Describe the recommendation in words, with the command that starts it."""
    size = planner.footprint(chosen).device
    rows = planner.largest_rows(chosen, limit)
    options = "" if not chosen.checkpointing or chosen.engine.startswith("fsdp") else " --gradient_checkpointing"
    options += " --bf16" if planner.bf16 else ""
    adapters = f"\nGive AccelTrainer the technique LoRA(rank={planner.lora_rank})." if chosen.lora else ""
    return (
        f"Use {chosen}: {_gigabytes(size)} of {_gigabytes(limit)} GB; the largest --batch that fits is "
        f"{rows:,}.{adapters}\n"
        f"Written: {', '.join(map(str, written))}. Start with\n"
        f"  accelerate launch --config_file {written[0]} train.py "
        f"--per_device_train_batch_size {planner.subject.rows}{options}"
    )


def _print_json(planner: Planner, settings: list[Setting], chosen: Setting | None, limit: float, timed: Any) -> None:
    def described(setting: Setting) -> dict[str, object]:
        found = planner.footprint(setting)
        fits = found.device <= limit * (1 - KEPT_BACK)
        return vars(setting) | {"bytes": found._asdict(), "device_bytes": found.device, "fits": fits}

    document = {
        "model": planner.subject.name,
        "devices": planner.devices,
        "memory_bytes": limit,
        "settings": [described(setting) for setting in settings],
        "recommended": None if chosen is None else vars(chosen),
    }
    if timed is not None:
        document["budget"] = timed | {"forecast": dataclasses.asdict(timed["forecast"])}
    print(json.dumps(document))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:,.3f}"
