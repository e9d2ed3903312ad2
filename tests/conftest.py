"""Options and defaults of the whole suite."""

import gc
import os
from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared" / "data"
if SHARED.is_dir():  # real data, beside the checkout; tests that need them skip where there are none
    os.environ.setdefault("HF_ACCEL_DATA", str(SHARED))


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write the tables of docs/ from what ran")


def pytest_collection_modifyitems(config, items):
    """Full products run only where the marker expression names them."""
    if "full" not in config.option.markexpr:
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_collection_finish(session):
    """Trainer collects garbage in every run, and would look through all that the imports have made each time."""
    gc.collect()
    gc.freeze()
