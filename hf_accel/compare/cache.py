"""Records of finished runs, found again by what was run and with which code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import hf_accel

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "numpy", "peft", "scikit-learn")
REPORTING = (
    *("cli", "cards.py", "evidence.py"),
    *(f"compare/{name}.py" for name in ("statistics", "results", "report", "page", "charts", "comparison")),
)
"""Parts of the package that no run executes."""


@functools.cache
def code_hash() -> str:
    """A hash of the package's source, as far as runs execute it, and of what it stands on."""
    root = Path(hf_accel.__file__).parent
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(REPORTING):
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a record holds for."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def key(run: dict[str, Any]) -> str:
    """A hash of a run: its configuration, this package's code and that of techniques and workloads from elsewhere."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True, default=repr).encode())
    digest.update(code_hash().encode())
    named = [run["workload"], *(name for entry in run["recipe"].get("techniques", []) for name in entry)]
    for module in sorted({name.partition(":")[0] for name in named if ":" in name}):
        found = importlib.util.find_spec(module)
        if found is not None and found.origin is not None and Path(found.origin).is_file():
            digest.update(Path(found.origin).read_bytes())
    return digest.hexdigest()[:16]


def stamp(document: Any) -> str:
    """A hash of sizes and times of the local files that strings in a document name, and of those in named folders."""
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list | tuple):
        stamps = "".join(map(stamp, document))
        return hashlib.sha256(stamps.encode()).hexdigest()[:16] if stamps else ""
    try:
        path = Path(document).expanduser()
        if document == "" or not path.exists():
            return ""
    except (TypeError, OSError, RuntimeError):
        return ""  # a number, or too long for a path, or the home of nobody
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def load(path: Path) -> dict[str, Any] | None:
    """The record of a finished run; None where there is none, or where the run failed and may be tried again."""
    record = read(path)
    return record if record is not None and record["status"] == "finished" else None
