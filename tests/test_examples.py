import ast
import difflib
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OTHERS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "baseline.py")


def test_the_baseline_is_short():
    source = (EXAMPLES / "baseline.py").read_text()
    assert len(source.splitlines()) < 40 and "hf_accel" not in source


@pytest.mark.parametrize("name", OTHERS)
def test_other_examples_are_the_baseline_with_at_most_five_changed_lines(name):
    before, after = ((EXAMPLES / n).read_text().splitlines() for n in ("baseline.py", name))
    changes = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if re.match(r"[+-]\s*\S", line)]
    changes = [line for line in changes if not line.startswith(("---", "+++"))]
    added = sum(line.startswith("+") for line in changes)
    assert max(added, len(changes) - added) <= 5, changes
    ast.parse("\n".join(after))


@pytest.mark.parametrize("name", ["baseline.py", *OTHERS])
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    losses = re.findall(r"'eval_loss': '?([0-9.]+)", capsys.readouterr().out)
    assert float(losses[-1]) < 1.5
