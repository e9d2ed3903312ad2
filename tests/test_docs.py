"""What docs/ and the README say of techniques is what the code says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from hf_accel import evidence
from hf_accel.compare.workloads import WORKLOADS
from hf_accel.evidence.cards import markdown, meanings, source
from hf_accel.evidence.records import FREE
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
    references = DOCUMENTS[generate.card_path(kind)].split("\n## References\n")[1]
    assert "<https://" in references
    path = source(kind).relative_to(ROOT / "hf_accel")
    assert (ROOT / "tests" / path.parent / f"test_{path.name}").exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", DOCUMENTS[path]):
        assert link.startswith("http") or (path.parent / link).resolve() in DOCUMENTS or (path.parent / link).exists()


def test_the_data_of_every_workload_are_described():
    text = (ROOT / "docs" / "data.md").read_text()
    assert {name for name in WORKLOADS if f"`{name}`" not in text} == {"recipe"}


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


TRIALS = [{name: value for name in FREE} for value in (1, 2)]
"""A search that varied every option that Trainer offers for free."""


def test_the_results_have_every_candidate_the_fastest_first():
    def candidate(name, *techniques, role="candidate", **found):
        speed_ups = {"cpu_seconds": {"kind": "measured", "per_seed": [1.0] * 5, **found}}
        entries = [{technique: {}} for technique in techniques]
        return {"name": name, "role": role, "of": None, "techniques": entries, "speed_ups": speed_ups, "p_value": 0.001}

    slower = candidate("InfoBatch", "InfoBatch", value=0.8, low=0.7, high=0.9, text="0.80x [0.70, 0.90]")
    faster = candidate("pretrain", "Muon", "LinearToZero", value=2.0, low=1.8, high=2.2, text="2.00x [1.80, 2.20]")
    missed = candidate("Muon", "Muon", kind="miss", value=0.0, low=0.0, high=None, text="miss (1 of 5)")
    placebo = candidate("subset", role="placebo", value=1.0, low=0.9, high=1.1, text="1.00x [0.90, 1.10]")
    slower |= {"techniques": [{"InfoBatch": {"keep": 0.3, "end": 0.875}}], "args": {"learning_rate": 0.1}}
    faster["over_defaults"] = {"text": "5.00x [4.00, 6.00]"}
    about = {"cost": "cpu_seconds", "seeds": [1, 2, 3, 4, 5], "machine": "a processor"}
    new = about | {"form": evidence.FORM, "tuned": "8 trials", "trials": {"baseline": TRIALS}}
    records = {
        "a": about | {"workload": "digits", "tuned": "", "arms": [missed, slower, placebo]},
        "b": new | {"workload": "code-lm", "arms": [faster, placebo | {"of": "pretrain"}]},
    }
    rows, end = generate.results_table(records).split("\n\n")
    assert rows.splitlines()[2:] == [
        "| [pretrain](configs/recipes/pretrain.yaml) (Muon, LinearToZero) | [b](docs/evidence/b.json) "
        "| 5.00x [4.00, 6.00] | 2.00x [1.80, 2.20] | faster | 5 |",
        "| [InfoBatch(keep=0.3)](docs/techniques/info_batch.md) with learning_rate "
        "0.1 | [a](docs/evidence/a.json) |  | 0.80x [0.70, 0.90] "
        "| slower, baseline not tuned | 5 |",
        "| [Muon](docs/techniques/muon.md) | [a](docs/evidence/a.json) |  | miss (1 of 5) "
        "| miss, baseline not tuned | 5 |",
    ]
    assert end == (
        "Speed-ups at equal quality with 95 % intervals, in CPU seconds. Machine: a processor. "
        "Records of an older form, without trials and without all placebos: [a](docs/evidence/a.json)."
    )


def test_a_technique_without_what_it_saves_is_refused_with_its_row():
    text = (ROOT / "docs" / "techniques.md").read_text()
    assert generate.index(text, evidence.load_records()) == text
    row = re.search(r"^\| \[Muon\].*\n", text, re.MULTILINE)[0]
    with pytest.raises(ValueError, match=r"what Muon saves. Add a row: \| \[Muon\]\(techniques/muon.md\)"):
        generate.index(text.replace(row, ""), {})


def test_baselines_that_never_decay_have_a_table_of_their_own():
    named = {"decayed": {"lr_scheduler_type": "linear"}, "constant": {"lr_scheduler_type": "constant_with_warmup"}}
    assert [name for name, args in named.items() if generate.constant_rate({"baseline_args": args})] == ["constant"]
    readme = DOCUMENTS[ROOT / "README.md"]
    decayed, constant = (readme.split(f"<!-- {name} -->")[1].split("<!-- /")[0] for name in ("results", "constant"))
    assert "-constant.json" not in decayed and "| decay |" not in decayed
    rows = [line for line in constant.splitlines() if ".json" in line]
    assert rows and all("-constant.json" in row for row in rows)


def test_the_first_numbers_are_those_of_the_fastest_of_fair_comparisons(tmp_path):
    def document(tuned, *arms, placebos=True):
        own = [arm(name, 1.0) | {"role": "placebo", "of": name} for name in ("Muon", "InfoBatch", "LAMB", "LARS")]
        return {
            "form": evidence.FORM,
            "trials": {"baseline": TRIALS},
            "workload": "novels-lm",
            "cost": "cpu_seconds",
            "machine": "a processor",
            "seeds": [1, 2],
            "tuned": tuned,
            "arms": [*arms, *(own if placebos else [])],
        }

    def arm(technique, value):
        speed_up = {"kind": "measured", "value": value, "low": value - 0.2, "high": value + 0.2, "text": f"{value}x"}
        return {
            "name": technique,
            "role": "candidate",
            "techniques": [{technique: {}}],
            "speed_ups": {"cpu_seconds": speed_up},
            "p_value": 0.001,
            "p_unadjusted": 0.001,
        }

    records = {
        "fair": document("8 trials", arm("Muon", 1.5), arm("InfoBatch", 1.1)),
        "faster": document("8 trials", arm("Muon", 1.8) | {"over_defaults": {"text": ">= 4.0x"}}),
        "untuned": document("", arm("LAMB", 9.0)),
        "unproven": document("8 trials", arm("LARS", 9.0), placebos=False),
    }
    overhead, kept = tmp_path / "overhead.json", tmp_path / "kept.json"
    overhead.write_text('{"wall": {"ratio": 1.01, "low": 1.0, "high": 1.02}}')
    runs = [{"case": "60s+load", "seconds": 57}, {"case": "2e6tok", "shares": {"tokens_share": 1.0}}]
    kept.write_text(json.dumps({"runs": runs}))
    said = generate.headline(records, overhead, kept)
    assert re.findall(r"^\| \[(\w+)\]\S+ \| ([^|]*) \| (\S+)", said, re.MULTILINE) == [("Muon", ">= 4.0x", "1.8x")]
    assert "Of 5 candidates, 4 met the best that Trainer can do" in said and "and 2 of these gained." in said
    none = generate.headline({"untuned": records["untuned"]}, overhead, kept)
    assert none.startswith("No speed-up is proven here yet.") and "and 0 of these gained." in none
    for words in ("(a processor)", "1 gained here, 3 showed no gain", "95.0% and 100.0%", "1.010x [1.000, 1.020]"):
        assert words in said, words


def test_budgets_may_be_compared_on_different_numbers_of_seeds(tmp_path):
    path = tmp_path / "budget.json"
    against = {"difference": 0.001, "low": -0.001, "high": 0.003, "margin": 0.004, "verdict": "non-inferior"}
    found = {
        "workload": "novels-lm",
        "budget_seconds": 120.0,
        "mean": {"budgeted": 1.5, "fixed": 1.51, "fixed at equal time": 1.499, "cut off": 1.6},
        "mean_seconds": {"budgeted": 119.9, "fixed": 117.0, "cut off": 120.3},
        "budgeted_against_fixed_at_equal_time": against,
        "budgeted_against_cut_off": {"better": True},
        "runs": {"budgeted": [{}] * 30, "fixed": [{}] * 30, "cut off": [{}] * 6},
    }
    path.write_text(json.dumps({"compared": [found]}))
    assert generate.budgets_table(path).splitlines()[-1] == (
        "| novels-lm | 120 s | 30 | 1.5000 in 119.9 s | 1.5100 in 117.0 s | 1.4990 "
        "| +0.0010 [-0.0010, +0.0030], margin 0.0040 | non-inferior | 1.6000 (6 seeds) | better |"
    )


def test_the_glossary_has_each_term_once_in_at_most_two_sentences():
    rows = re.findall(r"^\| \*(.+)\* \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for term, _ in rows]
    assert len(terms) > 50 and len(set(terms)) == len(terms)
    assert not [term for term, meaning in rows if len(re.findall(r"[.!?](?= |$)", meaning)) > 2]
