"""What docs/ and the README say of techniques is what the code says."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from hf_accel.cards import markdown, meanings, source
from hf_accel.recipe import known_techniques

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)
DOCUMENTS = generate.documents()
TECHNIQUES = known_techniques()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_is_current(path):
    assert path.exists() and path.read_text() == DOCUMENTS[path], "run: python docs/generate.py"


def test_there_is_no_card_of_what_is_gone():
    assert set((ROOT / "docs" / "techniques").glob("*.md")) <= DOCUMENTS.keys()


@pytest.mark.parametrize("kind", TECHNIQUES.values(), ids=TECHNIQUES)
def test_a_technique_has_a_card_with_a_paper_and_a_test_of_its_own(kind):
    text = DOCUMENTS[generate.card_path(kind)]
    reference = re.search(r"^\*\*Reference\.\*\* (.*)", text, re.MULTILINE)[1]
    assert "<https://" in reference
    path = source(kind).relative_to(ROOT / "hf_accel")
    assert (ROOT / "tests" / path.parent / f"test_{path.name}").exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", DOCUMENTS[path]):
        assert link.startswith("http") or (path.parent / link).resolve() in DOCUMENTS or (path.parent / link).exists()


def test_docstrings_explain_the_fields_that_there_are():
    for kind in TECHNIQUES.values():
        assert list(meanings(kind)) == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://arxiv.org/abs/1234.56789.", "see <https://arxiv.org/abs/1234.56789>."),
        ("(https://x.org/a-b/), arXiv:2502.06761;", "(<https://x.org/a-b/>), <https://arxiv.org/abs/2502.06761>;"),
        ("``keep`` is\n\n    k = ``keep`` * n", "`keep` is\n\n    k = keep * n"),
    ],
)
def test_docstrings_become_markdown(text, expected):
    assert markdown(text) == expected


def test_the_results_have_every_candidate_the_fastest_first():
    def candidate(name, *techniques, role="candidate", **found):
        speed_ups = {"cpu_seconds": {"kind": "measured", "per_seed": [1.0] * 5, **found}}
        entries = [{technique: {}} for technique in techniques]
        return {"name": name, "role": role, "of": None, "techniques": entries, "speed_ups": speed_ups, "p_value": 0.001}

    slower = candidate("InfoBatch(keep=0.5)", "InfoBatch", value=0.8, low=0.7, high=0.9, text="0.80x [0.70, 0.90]")
    faster = candidate("pretrain", "Muon", "LinearToZero", value=2.0, low=1.8, high=2.2, text="2.00x [1.80, 2.20]")
    missed = candidate("Muon", "Muon", kind="miss", value=0.0, low=0.0, high=None, text="miss (1 of 5)")
    placebo = candidate("subset", role="placebo", value=1.0, low=0.9, high=1.1, text="1.00x [0.90, 1.10]")
    about = {"cost": "cpu_seconds", "seeds": [1, 2, 3, 4, 5], "machine": "a processor", "placebos": True}
    records = {
        "a": about | {"workload": "digits", "tuned": "", "arms": [missed, slower, placebo]},
        "b": about | {"workload": "code-lm", "tuned": "8 trials", "arms": [faster]},
    }
    rows, end = generate.results_table(records).split("\n\n")
    assert rows.splitlines()[2:] == [
        "| pretrain (Muon, LinearToZero) | [b](docs/evidence/b.json) | 2.00x [1.80, 2.20] | faster | 5 |",
        "| [InfoBatch(keep=0.5)](docs/techniques/info_batch.md) | [a](docs/evidence/a.json) | 0.80x [0.70, 0.90] "
        "| slower, baseline not tuned | 5 |",
        "| [Muon](docs/techniques/muon.md) | [a](docs/evidence/a.json) | miss (1 of 5) "
        "| miss, baseline not tuned | 5 |",
    ]
    assert end == "Speed-ups are in CPU seconds. Machine: a processor."
