"""Read data files, and describe a faulty one in one sentence."""

from __future__ import annotations

import gzip
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from hf_accel.recipe import RecipeError

TEXT = (".txt", ".txt.gz", ".md", ".py")
TABLES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


def read_documents(source: str, text_column: str) -> list[str]:
    """Read the documents of ``stdlib``, a text file, a table with a column of texts, or a folder of text files."""
    if source == "stdlib":
        return standard_library()
    path = existing(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.name.endswith(TEXT) and file.is_file()]
        documents = [text for file in files if (text := read_text(file))]
        if not documents:
            raise RecipeError(f"data({source!r}): the folder has no text. Put files of {', '.join(TEXT)} there.")
        return documents
    if path.name.endswith(TABLES):
        return texts(read_table(source, [text_column]), source, text_column)
    text = read_text(path)
    if not text.strip():
        raise RecipeError(f"data({source!r}): the file is empty. Give one with text.")
    return [text]


def standard_library() -> list[str]:
    """Read the source files of this Python's standard library, without its tests, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [file for file in root.rglob("*.py") if not others & set(file.relative_to(root).parts)]
    if not files:
        raise RecipeError(f"data('stdlib'): there are no .py files in {root}. Name a text file as source instead.")
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(files)]


def read_text(path: Path) -> str:
    """Read the text of a file, and unpack it if its name ends with .gz."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"data({str(path)!r}): is not UTF-8 text. Convert it, or give {', '.join(TABLES)}.") from None
    except (OSError, EOFError) as error:
        raise RecipeError(f"data({str(path)!r}): cannot be read ({_short(error)}). Check the file.") from None


def read_table(source: str, columns: list[str]) -> pyarrow.Table:
    """Read the named columns of a table; all of them must exist."""
    path = existing(source)
    stem = path.name.removesuffix(".gz")
    if path.is_dir() or not path.name.endswith(TABLES):
        raise RecipeError(f"data({source!r}): is not a table. Give a file of {', '.join(TABLES)}.")
    if path.stat().st_size == 0:
        raise RecipeError(f"data({source!r}): the file is empty. Give one with rows.")
    try:
        if stem.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
        elif stem.endswith(".csv"):
            table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
        else:
            # One row must fit into a block.
            table = pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(block_size=2**26))
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"data({source!r}): cannot be read ({_short(error)}). Check the file.") from None
    for column in columns:
        if column not in table.column_names:
            there = ", ".join(map(repr, table.column_names))
            raise RecipeError(f"data({source!r}): has no column {column!r}. Name one of those it has: {there}.")
        if missing := table[column].null_count:
            raise RecipeError(f"data({source!r}): {missing} rows have no {column!r}. Remove or fill them.")
    if table.num_rows == 0:
        raise RecipeError(f"data({source!r}): has no rows. Give a file with rows.")
    return table.select(columns)


def texts(table: pyarrow.Table, source: str, column: str) -> list[str]:
    """Return a column that must hold texts."""
    kind = table[column].type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise RecipeError(f"data({source!r}): column {column!r} holds {kind}, not text. Name a column with text.")
    return table[column].to_pylist()


def existing(source: str) -> Path:
    """Return the path of a file or folder that must exist."""
    path = Path(source).expanduser()
    if not path.exists():
        raise RecipeError(f"data({source!r}): there is no such file. Check the path.")
    return path


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
