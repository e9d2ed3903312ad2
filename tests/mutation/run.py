"""Plants one fault at a time into a copy of the package, and tells which test notices.

    python tests/mutation/run.py                            every fault, with the tests that should notice it
    python tests/mutation/run.py --only progress-goes-back
    python tests/mutation/run.py --only heartbeat-ignored --tests tests/test_kill.py tests/test_stopped.py
    python tests/mutation/run.py --options '-m full'        as options of pytest, for another part of the suite

A fault is killed by the first test that fails, and survives where all pass.  The exit code is 1 where one survives.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault, find

ROOT = Path(__file__).parents[2]
SURVIVED, KILLED, TIMED_OUT, NO_TEST, BROKEN = "survived", "killed", "timed out", "no test selected", "broken"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
}
IMPORTED = (
    "torch.distributed.fsdp accelerate datasets peft scipy.stats transformers.trainer transformers.trainer_seq2seq "
    "transformers.models.auto.modeling_auto transformers.models.bert.modeling_bert "
    "transformers.models.llama.modeling_llama transformers.models.convnext.modeling_convnext"
).split()
"""What every test imports, before a process is forked for each fault; nothing of ours."""
# Not `test_faults.py`, which sees that a text is gone and nothing else.
OPTIONS = "-x -q -n 0 -p no:cacheprovider --tb=short -rfE --ignore=tests/mutation".split()
OPTIONS += ["-m", "not full"]  # as in continuous integration; options that are given later replace it
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before pytest was asked


class Outcome(NamedTuple):
    """What pytest said of one fault.

    Args:
        verdict: ``killed``, ``survived``, ``timed out``, ``no test selected`` or ``broken`` (pytest itself failed).
        test: The test that failed.
        seconds: Of the run.
        output: The last lines of pytest.
    """

    verdict: str
    test: str
    seconds: float
    output: str


def planted(fault: Fault | None, folder: Path) -> Path:
    """A checkout in a folder whose package has the fault; None: none.  All but package and tests are links."""
    for path in ROOT.iterdir():
        if path.name in ("hf_accel", "tests"):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != ".git":
            (folder / path.name).symlink_to(path)
    if fault is not None:
        place = find(fault, folder / "hf_accel")
        place.write_text(place.read_text().replace(fault.original, fault.replacement))
    return folder


def run_pytest(checkout: Path, arguments: Sequence[str], log: Path) -> NoReturn:
    """Run pytest in this process, which was forked for it, with the package of a checkout."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 3  # pytest's own, of an internal error
    try:
        os.chdir(checkout)
        os.environ |= {"PYTHONPATH": str(checkout), "TMPDIR": str(log.parent)}  # for processes that a test starts
        sys.path[:] = [str(checkout), *sys.path[1:]]
        tempfile.tempdir = None
        code = int(pytest.main(list(arguments)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def try_out(fault: Fault | None, tests: Sequence[str], options: Sequence[str], timeout: float) -> Outcome:
    """Run tests, up to the first failure, against a copy of the package with a fault."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        checkout, log = Path(scratch, "checkout"), Path(scratch, "log")
        checkout.mkdir()
        planted(fault, checkout)
        if (shared := ROOT.parent / "shared").is_dir():  # data beside the checkout
            Path(scratch, "shared").symlink_to(shared)
        if (child := os.fork()) == 0:
            run_pytest(checkout, [*OPTIONS, *options, *tests], log)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - began < timeout:
            time.sleep(0.1)
        if ended == (0, 0):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(TIMED_OUT, "", time.monotonic() - began, "")
        output = log.read_text()
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    verdict = {0: SURVIVED, 5: NO_TEST}.get(os.waitstatus_to_exitcode(ended[1]), KILLED if failed else BROKEN)
    return Outcome(verdict, failed[0] if failed else "", time.monotonic() - began, "\n".join(output.splitlines()[-15:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="faults to plant")
    parser.add_argument("--tests", metavar="EXPR", nargs="+", help="tests to run instead of those of each fault")
    parser.add_argument("--options", default="", help="more options of pytest")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a fault")
    parser.add_argument("--json", type=Path, help="file to which outcomes are added")
    given = parser.parse_args()
    if unknown := sorted(set(given.only or ()) - {fault.name for fault in FAULTS}):
        parser.error(f"there is no fault {unknown[0]!r}. Known: {', '.join(fault.name for fault in FAULTS)}.")
    os.environ |= ENVIRONMENT
    sys.dont_write_bytecode = True
    for name in IMPORTED:
        importlib.import_module(name)
    outcomes = {}
    for fault in FAULTS:
        if given.only and fault.name not in given.only:
            continue
        tests = given.tests or shlex.split(fault.tests)
        outcomes[fault.name] = found = try_out(fault, tests, shlex.split(given.options), given.timeout)
        print(f"{fault.name:34} {found.verdict:10} {found.seconds:5.0f} s  {found.test}", flush=True)
        if found.verdict in (BROKEN, NO_TEST):
            print(found.output, flush=True)
        if given.json is not None:
            known = json.loads(given.json.read_text()) if given.json.exists() else []
            known.append({"name": fault.name, "tests": tests, "options": given.options, **found._asdict()})
            given.json.write_text(json.dumps(known, indent=1) + "\n")
    if killers := sorted({found.test for found in outcomes.values() if found.verdict == KILLED}):
        whole = try_out(None, killers, [], len(killers) * given.timeout)
        print(f"without a fault, the tests that killed one: {whole.seconds:.0f} s, {whole.output.splitlines()[-1]}")
    counts = {verdict: sum(o.verdict == verdict for o in outcomes.values()) for verdict in (KILLED, SURVIVED)}
    print(f"{len(outcomes)} faults: {counts[KILLED]} killed, {counts[SURVIVED]} survived")
    return int(counts[KILLED] < len(outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
