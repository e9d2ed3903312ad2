"""Read the prose of this repository: docstrings, comments and other texts of Python files, and Markdown.

``python tests/prose.py [PATH ...]`` prints banned turns and sentences of more than 25 words.
"""

from __future__ import annotations

import ast
import inspect
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LONGEST = 25
"""Words of a sentence."""

BANNED = {
    r"\bof (?:which|whom)\b": "start a new sentence",
    r"\bwhat (?:is|was|are|were|has|had)\b": "name the thing",
    r"\bwhose(?: \w+){1,3} (?:is|was|are|were)\b": "use 'with' or a new sentence",
    r"\bas (?:it|they) (?:is|was|are|were|had|has|do|does|did)\b": "unchanged; in the same way",
    r"\banew\b": "again; new",
    r"\bg(?:o|oes|one|oing) on\b": "continue",
    r"\bWho [a-z]+s\b": "name the actor",
    r"(?:^|[.;:!?] )What (?!.*\?)": "name the thing, or start with a verb",
    r"(?:^|[.;!?] )Of (?:the|each|every|all|an?|its|their|these|those|several)\b": "start with the actor or the verb",
    r"\bbut for\b": "except for",
    r"\bin the place of\b": "instead of",
    r"\bone's own\b": "your own; custom",
    r"\b(?:is|are|was|were) said\b": "say who says it",
    r"\b[Ll]eave (?:it|that|them) out\b": "say what to remove, or which value to set",
    r"\b(?:there|where|here)(?:of|by|in|upon|with)\b": "with it; of it",
    r"\bdearer\b": "more expensive",
    r"\b(?:nothing|none|nobody) is (?:to|known)\b": "say what is unknown or not needed",
    r"\b(?:was|were) to (?:be|have|run)\b": "requested; planned",
    r"\bunlearnt\b|\blearnt\b": "learned",
    r"(?i:\b(?:\w*(?:normal|initial|quant|optim|synchron|parametr|regular|factor|memor|serial|organ|minim|maxim|util))"
    r"is(?:e[ds]?|ers?|ing|ation)\b)": "American spelling: -ize",
    r"(?i:\b\w*(?:behaviour|colour|favour|honour|neighbour|labour)\w*)": "American spelling: -or",
    r"(?i:\b(?:re)?cent(?:re[ds]?|ring)\b|\b(?:licence|grey|modelling|labelled|labelling)\b)": "American spelling",
}
"""Turns that are not plain American English, each with what to write instead."""


class Text(NamedTuple):
    """A piece of prose and where it starts."""

    path: Path
    line: int
    words: str


def texts(path: Path) -> list[Text]:
    """Return the prose of a file in which code is blank: a Python file's strings and comments, or Markdown."""
    found = python(path) if path.suffix == ".py" else markdown(path)
    return [Text(path, line, plain(words)) for line, words in found if " " in words.strip()]


def plain(words: str) -> str:
    """Replace code by `_`, and join lines."""
    words = re.sub(r"``.+?``|`[^`]+`", "_", words, flags=re.DOTALL)
    words = re.sub(r"https?://\S+", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", words))
    return " ".join(words.split())


def python(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every string, and every block of comments, with its line."""
    source = path.read_text()
    parts: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            values = (value.value if isinstance(value, ast.Constant) else "_" for value in node.values)
            yield node.lineno, "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield from ((node.lineno, block) for block in blocks(node.value))
    line, block = -2, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != line + len(block):
                yield line, " ".join(block)
                line, block = token.start[0], []
            block.append(token.string.lstrip("#: "))
    yield line, " ".join(block)


def blocks(text: str) -> list[str]:
    """Split a string into paragraphs, list items, sections and descriptions of arguments, without indented formulas."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    prose = "\n\n".join(paragraph for paragraph in paragraphs if not paragraph.startswith("    "))
    return re.split(r"\n\s*\n|\n(?=- |[A-Z][\w ]+:\s)|\n    (?=\w+: )", prose)


def markdown(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs, list items and table cells of a document.

    Numbered lists are left out: in generated documents they quote errors, which their source answers for.
    """
    blank = lambda found: "\n" * found[0].count("\n")  # noqa: E731
    source = re.sub(r"^```.*?^```|<!--.*?-->", blank, path.read_text(), flags=re.DOTALL | re.MULTILINE)
    start, block = 1, ""
    for number, line in enumerate([*source.split("\n"), ""], 1):
        if line.startswith("|"):
            yield from ((number, cell) for cell in line.strip("|").split("|"))
        elif not re.match(r"\d+\. |    ", line):
            if re.match(r"\s*(?:[-*] |#|$)", line):
                yield start, block
                start, block = number, ""
            block += " " + line.strip().lstrip("#-* ")


def banned(text: Text) -> Iterator[str]:
    """Describe each banned turn of a text."""
    for pattern, remedy in BANNED.items():
        for found in re.finditer(pattern, text.words):
            near = text.words[max(found.start() - 40, 0) : found.end() + 40]
            yield f"{os.path.relpath(text.path)}:{text.line}: {found[0].strip()!r} ({remedy}) in: ...{near}..."


def long_sentences(text: Text) -> Iterator[str]:
    """Yield each sentence of more than `LONGEST` words."""
    for sentence in re.split(r"(?<=[.:;!?])\s+(?=[A-Z_`\"(])", text.words):
        if len(re.findall(r"[A-Za-z]\w*", sentence)) > LONGEST:
            yield f"{os.path.relpath(text.path)}:{text.line}: {sentence}"


def documents(*paths: Path) -> list[Path]:
    """List the Python and Markdown files in folders."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [file for file in files if file.suffix in (".py", ".md")]


if __name__ == "__main__":
    for path in documents(*map(Path.resolve, map(Path, sys.argv[1:] or ["hf_accel", "docs", "README.md"]))):
        for text in texts(path):
            for line in (*banned(text), *long_sentences(text)):
                print(line)
