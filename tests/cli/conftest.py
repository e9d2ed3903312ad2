"""A command is a process of its own; here, what it says to others about logging ends with the test."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def verbosity():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
