"""``hf-accel export``: write the averaged model of a checkpoint as an ordinary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from hf_accel.checkpoints import format as ckpt
from hf_accel.cli.soup import refuse_full


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder checkpoint-N.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the model. Default: averaged-N beside the checkpoint.")
    ] = None,
) -> None:
    """Write the averaged model of a checkpoint as a folder for from_pretrained."""
    out = out or checkpoint.with_name(checkpoint.name.replace("checkpoint", "averaged"))
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint}: there is no checkpoint. Name a checkpoint-N directory.")
    if (fault := ckpt.integrity_error(checkpoint)) is not None:
        raise ValueError(f"{checkpoint}: the checkpoint is not complete: {fault}. Name another one.")
    if (averages := ckpt.load_averaged(checkpoint)) is None:
        raise ValueError(f"{checkpoint}: holds no averaged weights. Load it with from_pretrained.")
    refuse_full(out)
    logging.disable_progress_bar()
    write(checkpoint, averages, out)
    Console().print(f"The averaged model is in {out}.", highlight=False, soft_wrap=True)


def write(checkpoint: Path, averages: dict[str, Tensor], out: Path) -> None:
    """Write the model or the adapter of a checkpoint with averages instead of its weights."""
    from safetensors.torch import save_file

    from hf_accel.tools.soup import ADAPTER, copy_companions, is_adapter, load_adapter, load_model

    if is_adapter(checkpoint):
        config, tensors = load_adapter(checkpoint)
        averages = {in_adapter_file(name): average for name, average in averages.items()}
        _refuse_unknown(checkpoint, averages, tensors)
        config.save_pretrained(str(out))
        save_file(tensors | averages, out / ADAPTER, metadata={"format": "pt"})
    else:
        model = load_model(checkpoint)
        _refuse_unknown(checkpoint, averages, model.state_dict())
        model.load_state_dict(averages, strict=False)
        model.save_pretrained(out)
    copy_companions(checkpoint, out)


def in_adapter_file(name: str) -> str:
    """Return the name that peft's files use for a parameter of the adapter ``default``."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _refuse_unknown(checkpoint: Path, averages: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if unknown := sorted(averages.keys() - tensors.keys()):
        raise ValueError(
            f"{checkpoint}: its model lacks {len(unknown)} of the averaged weights, such as {unknown[0]}. "
            "Load the model as in training, and averaged.safetensors into it."
        )
