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
from typing import Any

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def environment(single_threaded: bool) -> dict[str, str]:
    """The environment of a worker: one thread, nothing to download in the middle of a measurement."""
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return os.environ | own | (dict.fromkeys(THREADS, "1") if single_threaded else {})


@contextmanager
def server(single_threaded: bool) -> Iterator[subprocess.Popen]:
    """A `hf_accel.compare.worker` that waits for jobs; it ends, with its present job, when the context does."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "hf_accel.compare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(single_threaded),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_jobs(
    jobs: Iterable[dict[str, Any]], slots: int, single_threaded: bool, done: Callable[[dict[str, Any], int], None]
) -> None:
    """Run jobs in order, ``slots`` at a time; ``done(job, exit status)`` is called in this thread after each."""
    upcoming = iter(jobs)
    results: queue.Queue = queue.Queue()
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(server(single_threaded)) for _ in range(slots)]
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
                raise RuntimeError("compare: a worker has died. Look into the logs of the runs.")
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
