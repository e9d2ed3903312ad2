"""The examples do what their first lines say, on the data that they bring."""

from __future__ import annotations

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
VARIANTS = {"accelerated.py", "attached.py", "callbacks.py"}
RUNS = {
    "baseline.py": ([], 1.5),
    "accelerated.py": ([], 1.5),
    "attached.py": ([], 1.6),
    "callbacks.py": ([], 1.6),
    "image_classification.py": ([], 1.5),
    "launched.py": (
        "--learning_rate 3e-3 --per_device_train_batch_size 32 --report_to none --budget 3epochs --use_cpu "
        "--techniques InfoBatch(keep=0.8)".split(),
        1.6,
    ),
    "own_technique.py": ([], 3.5),
    "pretrain.py": (["--budget", "40steps"], 3.5),
    "raw_loop.py": ([], 0.7),
    "sentence_embeddings.py": ([], 0.5),
    "sft.py": ([], 1.0),
}
"""Arguments and the loss that is reached, by example."""
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


def test_the_baseline_is_short():
    source = (EXAMPLES / "baseline.py").read_text()
    assert len(source.splitlines()) < 40 and "hf_accel" not in source


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_are_the_baseline_with_at_most_five_changed_lines(name):
    before, after = ((EXAMPLES / n).read_text().splitlines() for n in ("baseline.py", name))
    changes = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if re.match(r"[+-]\s*\S", line)]
    changes = [line for line in changes if not line.startswith(("---", "+++"))]
    added = sum(line.startswith("+") for line in changes)
    assert max(added, len(changes) - added) <= 5, changes
    ast.parse("\n".join(after))


def test_every_example_is_run():
    assert RUNS.keys() == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.full  # .ci/examples runs them as well
@pytest.mark.parametrize("name", RUNS)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    arguments, reached = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    losses = re.findall(r"'eval_loss': '?([0-9.]+)", capsys.readouterr().out)
    assert float(losses[-1]) < reached
