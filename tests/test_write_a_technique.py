"""The technique on the page about writing one keeps the contract."""

import re
import sys
from pathlib import Path

import pytest

from hf_accel.technique import HOOKS, SLOTS

PAGE = (Path(__file__).parents[1] / "docs" / "write_a_technique.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.ci
def test_the_example_keeps_the_contract(tmp_path, monkeypatch):
    (tmp_path / "cap_loss.py").write_text(BLOCKS[0])
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    exec(BLOCKS[2], found)
    found["test_contract"](tmp_path / "runs")
    sys.modules.pop("cap_loss")


def test_the_page_names_hooks_and_slots_that_exist():
    rows = re.findall(r"^\| [^|]+ \| (`.*`) \| (hook|slot) \|$", PAGE, re.MULTILINE)
    for names, kind in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in (HOOKS if kind == "hook" else SLOTS), name
    assert len(rows) > 15
