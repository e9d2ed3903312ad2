"""Write our files beside Trainer's checkpoint, and check that a checkpoint is complete.

    accel_state.json + .safetensors        clock, stream, techniques: the same on every rank, written by rank 0
    accel_rank{r}.json + .safetensors      what belongs to one rank
    averaged.safetensors                   averaged weights, under the model's own names
    accel_incomplete                       exists while a checkpoint is being written
    accel_complete.json                    sizes of all files and digests of ours; written last

No pickle.  A run does not resume from a started directory without a valid ``accel_complete.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "accel_state"
COMPLETE = "accel_complete.json"
SCRATCH = "accel_complete.json.tmp"
INCOMPLETE = "accel_incomplete"
AVERAGED = "averaged.safetensors"

TENSOR = "__tensor__"
"""Key of a tensor's name in a flattened state."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from."""


def save_state(directory: str | Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a nested state: tensors to ``name.safetensors``, everything else to ``name.json``."""
    tensors: dict[str, Tensor] = {}
    document = flatten_state(state, tensors)
    Path(directory).mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, Path(directory, f"{name}.safetensors"))
    Path(directory, f"{name}.json").write_text(json.dumps(document))


def load_state(directory: str | Path, name: str) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    try:
        document = json.loads(Path(directory, f"{name}.json").read_text())
        tensors = load_file(Path(directory, f"{name}.safetensors"))
        return unflatten_state(document, tensors)
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{Path(directory, name)}: the state file cannot be read ({type(error).__name__}). "
            "Resume from another checkpoint."
        ) from error


def flatten_state(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Replace the tensors of a nested state by names, and put them into ``tensors``; `unflatten_state` inverts it."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: flatten_state(item, tensors, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(flatten_state(item, tensors, f"{name}/{i}") for i, item in enumerate(value))
    return value


def unflatten_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild a nested state with tensors given by name."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: unflatten_state(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unflatten_state(item, tensors) for item in value)
    return value


def mark_incomplete(directory: str | Path) -> None:
    """Mark a directory as being written."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, INCOMPLETE).touch()
    Path(directory, COMPLETE).unlink(missing_ok=True)
    Path(directory, SCRATCH).unlink(missing_ok=True)


def mark_complete(directory: str | Path) -> None:
    """Mark a directory as completely written; the mark appears at once or not at all."""
    directory = Path(directory)
    marks = (COMPLETE, INCOMPLETE)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in marks)
    document = {
        "sizes": {str(path.relative_to(directory)): path.stat().st_size for path in files},
        "digests": {path.name: _digest(path) for path in files if path.name.startswith("accel_")},
    }
    scratch = directory / SCRATCH
    scratch.write_text(json.dumps(document, indent=1))
    scratch.replace(directory / COMPLETE)
    (directory / INCOMPLETE).unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def integrity_error(directory: str | Path, *, ours_only: bool = False) -> str | None:
    """Return the reason why a checkpoint is not complete; None if it is, or if a plain Trainer wrote it.

    With ``ours_only``, Trainer's files may have changed since.
    """
    directory = Path(directory)
    if not has_state(directory) and not (directory / INCOMPLETE).exists():
        return None if (directory / "trainer_state.json").is_file() else "it has no trainer_state.json"
    try:
        document = json.loads((directory / COMPLETE).read_text())
    except FileNotFoundError:
        return f"it has no {COMPLETE}"
    except (OSError, json.JSONDecodeError):
        return f"its {COMPLETE} cannot be read"
    for name, size in document["sizes"].items():
        path = directory / name
        if ours_only and name != AVERAGED and not name.startswith("accel_"):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name, digest in document["digests"].items():
        if _digest(directory / name) != digest:
            return f"{name} was changed"
    return None


def has_state(directory: str | Path) -> bool:
    """Return whether the checkpoint holds a state of ours; a plain Trainer's does not."""
    return Path(directory, f"{STATE}.json").is_file()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint directories of a run, newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_complete(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest complete checkpoint, and the newer ones that were skipped, each with its fault."""
    skipped: dict[str, str] = {}
    for path in checkpoints(output_dir):
        fault = integrity_error(path)
        if fault is None:
            return path, skipped
        skipped[path.name] = fault
    return None, skipped


def save_averaged(directory: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write averaged weights under the model's own names."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(directory, AVERAGED))


def load_averaged(directory: str | Path) -> dict[str, Tensor] | None:
    """Return the averaged weights of a checkpoint, or None if it has none."""
    path = Path(directory, AVERAGED)
    return load_file(path) if path.is_file() else None
