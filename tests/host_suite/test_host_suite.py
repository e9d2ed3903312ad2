"""Trainer's own tests pass with `AccelTrainer` in its place, except those of `expected.json`; see README.md."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_accel

FOLDER = os.environ.get("HF_ACCEL_TRANSFORMERS_TESTS", "")
EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text())

pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("host_suite"),
    pytest.mark.skipif(not FOLDER, reason="HF_ACCEL_TRANSFORMERS_TESTS does not name the tests of Transformers"),
]


@functools.cache
def outcomes(arm: str) -> dict[str, dict[str, str]]:
    """Run the tests with one arm; return the outcome and error of each test."""
    host = Path(FOLDER).resolve()
    path = [str(Path(__file__).parent), str(Path(hf_accel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ACCEL_HOST_ARM": arm,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    line = f"-m pytest -q -p arms -p no:cacheprovider -c {os.devnull} --rootdir {host.parent} {host / 'trainer'}"
    left_out = [f"--ignore={host / 'trainer' / name}" for name in ("distributed", "test_data_collator.py")]
    done = subprocess.run(
        [sys.executable, *line.split(), *left_out], env=environment, cwd=host.parent, capture_output=True, text=True
    )
    marked = [text for text in done.stdout.splitlines() if text.startswith("OUTCOMES ")]
    assert marked, done.stdout + done.stderr
    found = json.loads(marked[0].removeprefix("OUTCOMES "))
    counts = {kind: sum(f["outcome"] == kind for f in found.values()) for kind in ("passed", "failed", "skipped")}
    print(arm, counts)
    return found


def passing(arm: str) -> set[str]:
    return {test for test, found in outcomes(arm).items() if found["outcome"] == "passed"}


@pytest.mark.parametrize("arm", ["plain", "stream", "budget", "neutral"])
def test_what_passes_with_trainer_passes_with_ours(arm):
    expected = {test: group for group in EXPECTED if arm in group["arms"] for test in group["tests"]}
    assert len(passing("trainer")) > 200
    assert passing(arm) == passing("trainer") - expected.keys()
    for test, group in expected.items():
        assert group["sentence"] in outcomes(arm)[test]["error"], test
