"""Options and defaults of the whole suite."""

import gc
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"
if SHARED.is_dir():  # real data, beside the checkout; tests that need them skip where there are none
    os.environ.setdefault("HF_ACCEL_DATA", str(SHARED))


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write the tables of docs/ from what ran")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A table is written by the one process that ran all of its cells."""
    if config.getoption("write_docs"):
        config.option.numprocesses = 0
        config.option.dist = "no"


def pytest_collection_finish(session):
    """Trainer collects garbage in every run, and would look through all that the imports have made each time."""
    gc.collect()
    gc.freeze()
