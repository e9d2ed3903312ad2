"""Runs the jobs of a comparison, several at a time, each in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]

THREADS = (*(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")), "VECLIB_MAXIMUM_THREADS")


def environment(single_threaded: bool, slot: int = 0, gpus: int | None = None) -> dict[str, str]:
    """Return the environment of a slot's worker: one thread, and one of the GPUs (None: those that torch sees)."""
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if gpus > 1:  # Trainer would split every batch over all of them
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(gpus))))[slot % gpus]
    return os.environ | own | (dict.fromkeys(THREADS, "1") if single_threaded else {})


@contextmanager
def worker(single_threaded: bool, slot: int, log: Path) -> Iterator[subprocess.Popen]:
    """Start a `hf_accel.compare.worker`; kill it, and the job that it runs, at the end."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "hf_accel.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(single_threaded, slot),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_jobs(
    jobs: Iterable[Job], slots: int, single_threaded: bool, done: Callable[[Job, int], None], logs: Path
) -> None:
    """Run jobs in order, ``slots`` at a time; ``done(job, exit status)`` is called in this thread after each.

    The folder ``logs`` gets what workers print outside of jobs, as ``worker-N.log``.
    """
    upcoming, running = iter(jobs), {}
    with ThreadPoolExecutor(slots) as threads, ExitStack() as stack:
        paths = [logs / f"worker-{slot + 1}.log" for slot in range(slots)]
        free = [(stack.enter_context(worker(single_threaded, slot, path)), path) for slot, path in enumerate(paths)]
        while True:
            while free and (job := next(upcoming, None)) is not None:
                process, path = free.pop()
                future: Future[int | None] = threads.submit(_run, process, job)
                running[future] = process, path, job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                process, path, job = running.pop(future)
                status = future.result()
                if status is None:
                    raise RuntimeError(f"compare: a worker has died. See {path} and {job['log']}.")
                free.append((process, path))
                done(job, status)


def _run(process: subprocess.Popen, job: Job) -> int | None:
    """Give a worker a job and return its exit status; None if the worker has died."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError, ValueError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:  # libraries may print other lines
            if line.strip().lstrip("-").isdecimal():
                return int(line)
    return None
