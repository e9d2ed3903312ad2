"""Docstrings, comments, errors and documents are plain American English; `prose.BANNED` lists the turns to avoid."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import pytest
from prose import Text, banned, documents, long_sentences, plain, texts

ROOT = Path(__file__).parents[1]
PROSE = [ROOT / name for name in ("hf_accel", "docs", "README.md", "CHANGELOG.md")]
GENERATED = [ROOT / "docs" / "techniques", ROOT / "docs" / "sharding.md"]  # from the package, which is checked
PRESENT: dict[str, int] = {}
"""Banned turns that are still there, by path, each without the paths below it that are listed too."""


@functools.cache
def turns() -> dict[str, list[str]]:
    """Find the banned turns, by the longest path in `PRESENT` that holds the file; by "" if none does."""
    found = defaultdict(list)
    for path in documents(*PROSE):
        if not {path, *path.parents} & set(GENERATED):
            name = path.relative_to(ROOT).as_posix()
            holders = [place for place in PRESENT if f"{name}/".startswith(f"{place}/")]
            found[max(holders, key=len, default="")] += [line for text in texts(path) for line in banned(text)]
    return found


@pytest.mark.parametrize("place", ["", *PRESENT])
def test_no_banned_turn_is_added(place):
    found = turns()[place]
    assert len(found) <= PRESENT.get(place, 0), "\n".join(found)


@pytest.mark.parametrize(
    ("words", "turn"),
    [
        ("Epochs of which nothing is kept.", "of which"),
        ("The ids, and what is kept of them.", "what is"),
        ("A trainer whose loss is not its model's.", "whose loss is"),
        ("Copies the model as it was.", "as it was"),
        ("The optimizer starts anew.", "anew"),
        ("A run goes on from its checkpoint.", "goes on"),
        ("Who overfits trains less.", "Who overfits"),
        ("What a failed step has touched.", "What"),
        ("Of the limits, the first.", "Of the"),
        ("All but for rounding.", "but for"),
        ("ChannelsLast finds no convolution. Leave it out.", "Leave it out"),
        ("Weights are quantised.", "quantised"),
        ("The colour of neighbours.", "colour"),
    ],
)
def test_a_banned_turn_is_found(words, turn):
    found = list(banned(Text(ROOT / "README.md", 1, words)))
    assert found and any(f"'{turn}'" in line for line in found)


@pytest.mark.parametrize(
    "words",
    [
        "Return the ids that the epoch keeps.",
        "Keep what the user asked for.",
        "The examples, whose lengths differ, are padded.",
        "Precision and exercise promise a wise revision.",
        "InfoBatch does not support streams because it needs an index. Set streaming=False.",
    ],
)
def test_plain_words_pass(words):
    assert not list(banned(Text(ROOT / "README.md", 1, words)))


def test_code_and_formulas_are_no_prose(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Move ``what is`` on.\n\n    e = what is moved\n\nAnd end.\n"""\n\n# why: `anew`\nx = f"of {1} which"\n'
    )
    assert [text.words for text in texts(path)] == ["Move _ on.", "And end.", "of _ which", "why: _"]
    path = tmp_path / "document.md"
    path.write_text(
        "# A title\n\nA [link](anew.md) to `code`.\n\n```\ngoes on\n```\n\n- an item\n  of two lines\n1. an error\n"
    )
    assert [text.words for text in texts(path)] == ["A title", "A link to _.", "an item of two lines"]


def test_long_sentences_are_split_at_their_ends():
    words = plain("One two. " * 20 + "word " * 26)
    assert len(list(long_sentences(Text(ROOT / "README.md", 1, words)))) == 1
