import gzip
import re
import sysconfig
from pathlib import Path

import pandas
import pytest

from hf_accel import RecipeError
from hf_accel.tasks.files import read_documents, read_table, standard_library

ROWS = pandas.DataFrame({"text": ["one", "two\nlines", "three"], "label": [0, 1, 0]})


def write_table(path: Path, rows: pandas.DataFrame = ROWS) -> str:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        rows.to_parquet(path)
    elif name.endswith(".csv"):
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True)
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".json"])
def test_tables(tmp_path, suffix):
    path = write_table(tmp_path / f"rows{suffix}")
    assert read_table(path, ["label", "text"]).to_pylist() == ROWS[["label", "text"]].to_dict("records")
    assert read_documents(path, "text") == ["one", "two\nlines", "three"]


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt.gz").write_bytes(gzip.compress("zweiter \u00fc".encode()))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert read_documents(str(tmp_path / "a.txt"), "text") == ["first"]
    assert read_documents(str(tmp_path), "text") == ["first", "zweiter \u00fc"]


def test_the_standard_library_is_read_in_a_fixed_order_without_tests():
    documents = standard_library()
    assert documents == standard_library() and len(documents) > 100
    assert Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text() in documents


def a_file(tmp_path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


BAD = {
    "missing": (lambda d: str(d / "none.parquet"), "there is no such file. Check the path."),
    "empty": (lambda d: a_file(d, "x.parquet", b""), "the file is empty."),
    "not parquet": (lambda d: a_file(d, "x.parquet", b"no table"), "cannot be read ("),
    "not json": (lambda d: a_file(d, "x.jsonl", b"no table"), "cannot be read ("),
    "not gzip": (lambda d: a_file(d, "x.txt.gz", b"no archive"), "cannot be read ("),
    "cut gzip": (lambda d: a_file(d, "x.txt.gz", gzip.compress(b"long text" * 99)[:-20]), "cannot be read ("),
    "not utf-8": (lambda d: a_file(d, "x.txt", b"\xff\xfe\x00"), "is not UTF-8 text."),
    "blank": (lambda d: a_file(d, "x.txt", b" \n"), "the file is empty."),
    "no rows": (lambda d: write_table(d / "x.parquet", ROWS.head(0).astype({"text": str})), "has no rows."),
    "header only": (lambda d: a_file(d, "x.csv", b"text,label\n"), "has no rows."),
    "no column": (
        lambda d: write_table(d / "x.csv", ROWS.rename(columns={"text": "sentence"})),
        "has no column 'text'. Name one of those it has: 'sentence', 'label'.",
    ),
    "gaps": (lambda d: a_file(d, "x.jsonl", b'{"text": "a"}\n{"text": null}\n'), "1 rows have no 'text'."),
    "no text": (lambda d: a_file(d, "x.jsonl", b'{"text": 3}\n'), "column 'text' holds int64, not text."),
    "no texts": (lambda d: str(d), "the folder has no text."),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_named(tmp_path, kind):
    make, message = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        read_documents(path, "text")
    assert str(error.value).startswith(f"data({path!r}): ") and "\n" not in str(error.value)


def test_a_folder_or_a_picture_is_no_table(tmp_path):
    for path in (str(tmp_path), a_file(tmp_path, "x.png", b"\x89")):
        with pytest.raises(RecipeError, match="is not a table. Give a file of .parquet"):
            read_table(path, ["text"])
