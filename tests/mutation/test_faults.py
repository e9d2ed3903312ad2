"""The faults of `run.py` can still be planted."""

from pathlib import Path

import pytest
from mutation.faults import FAULTS, find

PACKAGE = Path(__file__).parents[2] / "hf_accel"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_text_is_there_once_and_makes_other_python(fault):
    source = find(fault, PACKAGE).read_text()
    faulty = source.replace(fault.original, fault.replacement)
    assert faulty != source
    compile(faulty, fault.module, "exec")


def test_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
