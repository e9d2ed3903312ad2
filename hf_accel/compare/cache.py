"""The cache of finished runs: a record is reused while its configuration, the code and the machine are the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import hf_accel

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "numpy", "peft", "scikit-learn")
NOT_RUN = ("cli/", "cards.py", "evidence", "compare/")
RUN = ("compare/worker.py", "compare/operations.py", "compare/pool.py", "compare/workloads/")
"""Prefixes of the files that runs do not execute, and of the exceptions to them."""


@functools.cache
def code_hash() -> str:
    """Hash the source that runs execute, and the versions of the libraries that it uses."""
    root = Path(hf_accel.__file__).parent
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if name.startswith(RUN) or not name.startswith(NOT_RUN):
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, the machine and the libraries."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Name the accelerator, or the processor and a run's share of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores, one thread a run"


def key(run: dict[str, Any]) -> str:
    """Hash a run's configuration, this package's code, and the modules of the user's techniques and workload."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True, default=repr).encode())
    digest.update(code_hash().encode())
    named = [run["workload"], *(name for entry in run["recipe"].get("techniques", []) for name in entry)]
    for module in sorted({name.partition(":")[0] for name in named if ":" in name}):
        found = importlib.util.find_spec(module)
        if found is not None and found.origin is not None and Path(found.origin).is_file():
            digest.update(Path(found.origin).read_bytes())
    return digest.hexdigest()[:16]


def stamp(document: Any) -> str:
    """Hash sizes and times of the local files and folders that strings in a document name."""
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
        return ""  # a number, a string too long for a path, or the home of an unknown user
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any] | None:
    """Read a record; None if there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def load(path: Path) -> dict[str, Any] | None:
    """Read the record of a finished run; None if there is none, or if the run failed and should be tried again."""
    record = read(path)
    return record if record is not None and record["status"] == "finished" else None
