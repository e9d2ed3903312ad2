"""Runs the jobs of a comparison, some at a time, each in a fresh single-threaded process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def environment(single_threaded: bool, slot: int = 0, gpus: int | None = None) -> dict[str, str]:
    """The environment of the worker of a slot: one thread, one of the GPUs (None: those that torch sees)."""
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if gpus > 1:  # Trainer would split every batch over all of them
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(gpus))))[slot % gpus]
    return os.environ | own | (dict.fromkeys(THREADS, "1") if single_threaded else {})


@contextmanager
def server(single_threaded: bool, slot: int, log: Path) -> Iterator[subprocess.Popen]:
    """A `hf_accel.compare.worker` that waits for jobs; it ends, with its present job, when the context does."""
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
    jobs: Iterable[dict[str, Any]],
    slots: int,
    single_threaded: bool,
    done: Callable[[dict[str, Any], int], None],
    logs: Path,
) -> None:
    """Run jobs in order, ``slots`` at a time; ``done(job, exit status)`` is called in this thread after each.

    What a worker itself has to say, beside the logs of its jobs, is in ``worker-N.log`` in the folder ``logs``.
    """
    upcoming = iter(jobs)
    results: queue.Queue = queue.Queue()
    paths = [logs / f"worker-{slot + 1}.log" for slot in range(slots)]
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(server(single_threaded, slot, path)) for slot, path in enumerate(paths)]
        log_of = dict(zip(free, paths, strict=True))
        running = 0
        while True:
            while free and (job := next(upcoming, None)) is not None:
                threading.Thread(target=_run, args=(free.pop(), job, results), daemon=True).start()
                running += 1
            if running == 0:
                return
            process, job, status = results.get()
            running -= 1
            if status is None:
                raise RuntimeError(f"compare: a worker has died. See {log_of[process]} and {job['log']}.")
            free.append(process)
            done(job, status)


def _run(process: subprocess.Popen, job: dict[str, Any], results: queue.Queue) -> None:
    """Give a worker a job and wait for its answer, which libraries may not have mixed with theirs."""
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.strip().lstrip("-").isdecimal():
                results.put((process, job, int(line)))
                return
    except (OSError, ValueError):
        pass  # the worker is gone
    results.put((process, job, None))
