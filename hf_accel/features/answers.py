"""Store a teacher's answers for every example of a training set in a folder.

    cache.json               the source of the answers, and the number of parts; written last
    part{r}.safetensors      of one rank's examples, in order: ``counts``, items of each example; ``log``, log-
                             probabilities of each item; ``classes``, of which classes, unless of all

Shape suffixes: ``N`` items or examples, ``K`` classes of an answer, ``B`` examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_accel.technique import Technique

Answer = tuple[Tensor, "Tensor | None", Tensor]
"""Items of each of a few examples; the classes of each item, or None for all; their log-probabilities."""


@dataclass
class Answers:
    """Hold a teacher's answers in memory."""

    counts_N: Tensor
    classes_NK: Tensor | None
    log_NK: Tensor

    def __post_init__(self) -> None:
        self.ends_N = self.counts_N.cumsum(0)

    def of(self, ids_B: Tensor, num_items: int, technique: Technique) -> tuple[Tensor | None, Tensor]:
        """Return classes and log-probabilities of some examples, item by item."""
        pairs = zip(self.ends_N[ids_B].tolist(), self.counts_N[ids_B].tolist(), strict=True)
        rows_N = torch.cat([torch.arange(end - count, end) for end, count in pairs])
        if len(rows_N) != num_items:
            raise ValueError(
                f"{technique!r}: the cache has {len(rows_N)} items of the examples {ids_B.tolist()}, which have "
                f"{num_items} now: another technique or an augmentation changes them. Remove it, or set cache=None."
            )
        return None if self.classes_NK is None else self.classes_NK[rows_N].long(), self.log_NK[rows_N]


def write_answers(technique: Technique, folder: Path, answers: Iterable[Answer], said: Mapping[str, Any]) -> None:
    """Write the teacher's answers for this rank's examples; all ranks write together."""
    run: Any = technique.run_
    counts, classes, log = zip(*answers, strict=True)
    tensors = {"counts": torch.cat(counts).cpu(), "log": torch.cat([values.cpu() for values in log])}
    if classes[0] is not None:
        tensors["classes"] = torch.cat([values.int().cpu() for values in classes])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"part{run.args.process_index}.safetensors")
    run.accelerator.wait_for_everyone()
    if run.is_world_process_zero():
        (folder / "cache.json").write_text(json.dumps({**said, "parts": run.args.world_size}))
    run.accelerator.wait_for_everyone()


def has_answers(folder: Path) -> bool:
    """Return whether a folder holds all of a teacher's answers."""
    return (folder / "cache.json").is_file()


def read_answers(technique: Technique, folder: Path, said: Mapping[str, Any]) -> Answers:
    """Read the answers in a folder; raise ValueError unless they come from the teacher and data in ``said``."""
    found = json.loads((folder / "cache.json").read_text())
    for name, value in said.items():
        if found[name] != value:
            raise ValueError(
                f"{technique!r}: {str(folder)!r} was written with {name}={found[name]!r}, and this run has {value!r}. "
                "Set cache to another folder."
            )
    parts = [load_file(folder / f"part{rank}.safetensors") for rank in range(found["parts"])]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Answers(whole["counts"], whole.get("classes"), whole["log"])
