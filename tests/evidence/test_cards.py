"""The card of a technique: sections of docstrings, the usage block, the settings that were compared."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import sys

import pytest
from transformers import Trainer, TrainingArguments

import hf_accel
from hf_accel.evidence import cards, records
from hf_accel.recipe import known_techniques, read_technique
from hf_accel.technique import Technique
from hf_accel.testing import VOCABULARY, tiny_llama

TECHNIQUES = known_techniques()
UNCONVERTED = 0
"""Techniques without ``Recommendation:`` in the module docstring; may only fall."""


def blocks(kind: type[Technique], language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", cards.usage(kind), re.DOTALL | re.MULTILINE)


def technique(block: str, option: str) -> Technique:
    """Evaluate what a block of Python gives to the trainer."""
    assignment = next(node for node in ast.parse(block).body if isinstance(node, ast.Assign))
    values = {keyword.arg: keyword.value for keyword in assignment.value.keywords}
    (built,) = eval(ast.unparse(values[option]), vars(hf_accel).copy())
    return built


@pytest.mark.parametrize("kind", TECHNIQUES.values(), ids=TECHNIQUES)
def test_a_usage_block_says_the_same_in_python_and_on_the_command_line(kind):
    ours, *plain = blocks(kind, "python")
    built = technique(ours, "techniques")
    assert type(built) is kind
    if "Example" not in cards.parts(kind)[2]:
        assert dataclasses.asdict(built) == dataclasses.asdict(kind())
    command, option, words, script = shlex.split(blocks(kind, "bash")[0])[1:]
    assert (command, option, script) == ("run", "--technique", "train.py")
    assert dataclasses.asdict(read_technique(words)) == dataclasses.asdict(built)
    assert bool(plain) is not bool(kind.implemented_hooks())
    for block in plain:
        assert dataclasses.asdict(technique(block, "callbacks")) == dataclasses.asdict(built)


@pytest.mark.parametrize("name", ["InfoBatch", "ExponentialMovingAverage", "LayerFreezing", "StochasticDepth"])
def test_a_usage_block_runs(name, tmp_path):
    texts = [{"input_ids": [i % VOCABULARY] * 8, "labels": [i % VOCABULARY] * 8} for i in range(16)]
    for block in blocks(TECHNIQUES[name], "python"):
        args = TrainingArguments(tmp_path, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True)
        found = {"model": tiny_llama(), "args": args, "train_dataset": texts, "Trainer": Trainer}
        exec(f"from hf_accel import {name}\n{block}", found)
        if "callbacks=" in block:
            found["trainer"].train()
        assert found["trainer"].state.global_step == 2


@pytest.mark.parametrize("kind", TECHNIQUES.values(), ids=TECHNIQUES)
def test_a_converted_docstring_has_every_section(kind):
    summary, body, sections = cards.parts(kind)
    assert summary and body
    if "Recommendation" not in sections:
        return
    recommended = sections["Recommendation"]
    assert re.fullmatch(rf"(Use|Do not use) {kind.__name__} (?!.*\. ).+\.", " ".join(recommended.split()))
    assert len(recommended.split()) <= 25
    assert summary.endswith(".") and sections["Differences from the paper"] != "None stated."
    needed = [field.name for field in dataclasses.fields(kind) if getattr(kind(), field.name) not in (None, {}, [])]
    assert "Defaults" in sections or all(map(cards.sources(kind).get, needed)), "say where the defaults come from"


def test_docstrings_are_converted():
    unconverted = [name for name, kind in TECHNIQUES.items() if "Recommendation" not in cards.parts(kind)[2]]
    assert len(unconverted) <= UNCONVERTED, unconverted


def test_a_missing_section_is_named(monkeypatch):
    module = sys.modules[TECHNIQUES["InfoBatch"].__module__]
    monkeypatch.setattr(module, "__doc__", module.__doc__.replace("When not to use:", "Never:"))
    with pytest.raises(ValueError, match=r"^info_batch\.py: its docstring has no section 'When not to use'\. Write"):
        cards.parts(TECHNIQUES["InfoBatch"])


@dataclasses.dataclass(eq=False)
class Sourced(Technique):
    """Show fields with and without a source."""

    keep: float = 0.5  # the paper's
    end: str = "# no comment"
    rules: dict[str, int] = dataclasses.field(
        default_factory=dict,
    )  # none: as PyTorch does it


@dataclasses.dataclass(eq=False)
class Inherited(Sourced):
    """Change one default."""

    end: str = "late"  # our choice


def test_the_comment_of_a_field_is_the_source_of_its_default():
    assert cards.sources(Sourced) == {"keep": "the paper's", "end": "", "rules": "none: as PyTorch does it"}
    assert cards.sources(Inherited) == {"keep": "the paper's", "end": "our choice", "rules": "none: as PyTorch does it"}


def test_settings_that_were_compared_are_listed_the_fastest_first():
    def tried(keep, args, *others, value, low, high):
        text = f"{value:.2f}x [{low:.2f}, {high}]"
        speed_up = {"kind": "measured", "value": value, "low": low, "high": high, "text": text}
        entries = [{"InfoBatch": {"keep": keep, "end": 0.875}}, *({other: {"lr": 0.1}} for other in others)]
        arm = {"name": "an arm", "role": "candidate", "techniques": entries, "args": args, "p_value": 0.001}
        arm["speed_ups"] = {"cpu_seconds": speed_up}
        placebo = {"name": "a placebo", "role": "placebo", "of": "an arm"}
        placebo["speed_ups"] = {"cpu_seconds": {"kind": "measured", "value": 1.0, "low": 0.95, "high": 1.05}}
        trials = [{name: value for name in records.FREE} for value in (1, 2)]
        found = {"cost": "cpu_seconds", "tuned": "8 trials", "trials": {"baseline": trials}}
        return found | {"arms": [arm, placebo]}

    slow = tried(0.5, {}, value=1.1, low=0.9, high=1.3)
    fast = tried(0.3, {"learning_rate": 0.1, "output_dir": "out"}, "Muon", value=1.5, low=1.2, high=1.8)
    found = cards.worked(TECHNIQUES["InfoBatch"], {"digits": slow, "sst2": fast})
    assert found.split("\n\n")[:2] == [
        "No setting of this technique alone has gained on the best of Trainer yet.",
        "| setting | comparison | speed-up | verdict |\n|---|---|---|---|\n"
        "| `keep=0.3, end=0.875` with `learning_rate=0.1`, beside `Muon` | [sst2](../evidence/sst2.json) "
        "| 1.50x [1.20, 1.8] | faster |\n"
        "| defaults (`keep=0.5, end=0.875`) | [digits](../evidence/digits.json) | 1.10x [0.90, 1.3] "
        "| no gain shown |",
    ]
    alone = cards.worked(TECHNIQUES["InfoBatch"], {"sst2": tried(0.3, {}, value=1.5, low=1.2, high=1.8)})
    assert alone.startswith("| setting |")
    unmeasured = cards.worked(TECHNIQUES["InfoBatch"], {})
    assert unmeasured.startswith(
        "Not measured here yet.\n\nSource of the defaults: the values are those of the authors"
    )
