"""``hf-accel plan``: what a model takes of each device's memory, which setting fits, and what fits in a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_accel.system.planning import KEPT_BACK, Planner, Setting, parse_bytes, subject_of, write_configs

WAYS = {
    (False, False): "all weights",
    (False, True): "+ checkpointing",
    (True, False): "LoRA",
    (True, True): "LoRA + ch.",
}
"""How a table names adapters and activation checkpointing."""


def plan(
    model: Annotated[str, typer.Argument(help="Folder or config.json of a model, name on the Hub, or recipe.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices of the machine.")] = 1,
    memory: Annotated[str, typer.Option(help="Of each device, as 80GB or 24GiB.")] = "80GB",
    length: Annotated[int | None, typer.Option(min=2, help="Positions of an example.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of a forward pass on a device.")] = None,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = True,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    output: Annotated[Path, typer.Option(help="Folder of the configuration files.")] = Path("accel_plan"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say what fits on the devices, recommend a setting, and write its configuration files."""
    limit = parse_bytes(memory)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output({str(output)!r}): is a file. Choose another --output.")
    subject = subject_of(model, rows=batch, length=length)
    planner = Planner(subject, devices=devices, bf16=bf16, lora_rank=lora_rank)
    settings = list(planner.settings())
    chosen = planner.recommend(limit, settings)
    written = [] if chosen is None else write_configs(output, chosen, devices, bf16)
    if as_json:
        _print_json(planner, settings, chosen, limit)
        raise typer.Exit(0 if chosen is not None else 1)
    console = Console()
    examples = f"{subject.rows} images" if subject.length is None else f"{subject.rows} x {subject.length} tokens"
    console.print(f"[bold]{subject.name}[/]: {examples} a device, {devices} x {memory}, AdamW", highlight=False)
    console.print(totals(planner, settings, limit))
    shown = chosen or min(settings, key=lambda setting: planner.footprint(setting).device)
    console.print(parts(planner, settings, shown))
    if chosen is None:
        smallest = planner.footprint(shown).device
        console.print(
            f"Nothing fits: the least is {_gigabytes(smallest)} GB of the {_gigabytes(limit)} GB ({shown}). "
            "Take fewer --batch or --length, or more devices.",
            highlight=False,
        )
        raise typer.Exit(1)
    console.print(advice(planner, chosen, limit, written), highlight=False)


def totals(planner: Planner, settings: list[Setting], limit: float) -> Table:
    """Memory of a device by engine and way."""
    table = Table(title="GB of a device", title_justify="left", caption_justify="left")
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
    table.caption = f"yes: fits, with {KEPT_BACK:.0%} of a device kept back for its allocator and context."
    return table


def parts(planner: Planner, settings: list[Setting], shown: Setting) -> Table:
    """What the memory is for, by engine, in the way of one setting."""
    way = WAYS[shown.lora, False] + (", activation checkpointing" if shown.checkpointing else "")
    table = Table(title=f"What it is for, in GB ({way})", title_justify="left", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    for name in ("weights", "grads", "AdamW", "activ.", "logits", "buffers", "host"):
        table.add_column(name, justify="right")
    for engine in dict.fromkeys(s.engine for s in settings):
        found = planner.footprint(Setting(engine, shown.checkpointing, shown.lora))
        row = [_gigabytes(size) if size else "-" for size in found]
        table.add_row(engine, *row, style="bold" if engine == shown.engine else None)
    table.caption = "When most is alive: gradients grow while activations go. Buffers: what is gathered or sent."
    return table


def advice(planner: Planner, chosen: Setting, limit: float, written: list[Path]) -> str:
    """The recommendation in words, and how to start."""
    size = planner.footprint(chosen).device
    rows = planner.largest_rows(chosen, limit)
    options = "" if not chosen.checkpointing or chosen.engine.startswith("fsdp") else " --gradient_checkpointing"
    options += " --bf16" if planner.bf16 else ""
    adapters = (
        f"\nGive Trainer a model with adapters: get_peft_model(model, LoraConfig(r={planner.lora_rank}, "
        'target_modules="all-linear")).'
        if chosen.lora
        else ""
    )
    return (
        f"Take {chosen}: {_gigabytes(size)} of {_gigabytes(limit)} GB; the largest --batch that fits is "
        f"{rows:,}.{adapters}\n"
        f"Written: {', '.join(map(str, written))}. Start with\n"
        f"  accelerate launch --config_file {written[0]} train.py "
        f"--per_device_train_batch_size {planner.subject.rows}{options}"
    )


def _print_json(planner: Planner, settings: list[Setting], chosen: Setting | None, limit: float) -> None:
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
    print(json.dumps(document))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:,.3f}"
