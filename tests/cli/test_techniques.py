from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hf_accel import evidence
from hf_accel.cli import app
from hf_accel.evidence import cards
from hf_accel.recipe import known_techniques

WIDE = {"COLUMNS": "160"}


def run(*line: str):
    return CliRunner().invoke(app, ["techniques", *line], env=WIDE)


def test_the_table_has_every_technique():
    shown = run()
    assert shown.exit_code == 0
    for name, kind in known_techniques().items():
        (line,) = (line for line in shown.output.splitlines() if f" {name} " in line)
        assert kind.fidelity in line and cards.area(kind) in line
    rows = json.loads(run("--json").stdout)
    assert {row["technique"] for row in rows} == set(known_techniques())
    assert next(row for row in rows if row["technique"] == "InfoBatch") == {
        "technique": "InfoBatch",
        "perspective": "data",
        "fidelity": "unbiased",
        "slots": ["select"],
        "evidence": evidence.grade("InfoBatch", evidence.load_records()),
    }


def test_a_name_prints_its_card():
    shown = run("InfoBatch")
    assert shown.exit_code == 0
    for words in ("Use InfoBatch if", "Perspective: data.", "When not to use", "Hyperparameters", "Evidence"):
        assert words in shown.output, words
    plain = json.loads(run("InfoBatch", "--json").stdout)
    assert plain["card"].startswith("# InfoBatch\n") and plain["slots"] == ["select"]


@pytest.mark.parametrize(
    ("name", "words"), [("InfoBtch", "Did you mean 'InfoBatch'?"), ("os:path", "no such technique")]
)
def test_an_unknown_name_ends_in_one_sentence_and_exit_code_2(name, words):
    shown = run(name)
    assert shown.exit_code == 2 and words in shown.stderr and shown.stderr.count("\n") == 1
