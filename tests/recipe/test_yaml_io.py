import pytest

from hf_accel.recipe.technique_syntax import nearest, read_call
from hf_accel.recipe.yaml_io import dump_yaml, load_yaml

VALUES = {
    "1e-3": 0.001,
    "1E5": 1e5,
    "-2.5e+1": -25.0,
    ".5": 0.5,
    "1.": 1.0,
    ".inf": float("inf"),
    "10_000": 10000,
    "010": 10,
    "0x1f": 31,
    "-7": -7,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "no": "no",
    "on": "on",
    "1:30": "1:30",
    "30min": "30min",
    "1e9tok": "1e9tok",
    "2026-01-01": "2026-01-01",
    "'1e-3'": "1e-3",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_are_those_of_yaml_1_2(text):
    value = load_yaml(f"key: {text}")["key"]
    assert value == VALUES[text] and type(value) is type(VALUES[text])


@pytest.mark.parametrize("value", [*VALUES.values(), *VALUES, 1e-5, 1e30, [1, {"a": None}], {"no": ["yes", "1e-3"]}])
def test_what_is_written_is_read_again(value):
    assert load_yaml(dump_yaml({"key": value})) == {"key": value}


def test_what_yaml_cannot_say_is_written_as_text():
    assert load_yaml(dump_yaml({"key": len})) == {"key": repr(len)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 1: 'a' appears twice. Keep one."),
        ("a: [1, 2\nb: 3", "line 2: expected ',' or ']', but got ':'. Correct the YAML there."),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
    ],
)
def test_bad_yaml_is_told_in_one_sentence(text, message):
    with pytest.raises(ValueError) as error:
        load_yaml(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("InfoBatch", ("InfoBatch", [], {})),
        ("InfoBatch()", ("InfoBatch", [], {})),
        (" InfoBatch(keep=0.5) ", ("InfoBatch", [], {"keep": 0.5})),
        ("Budget('30min')", ("Budget", ["30min"], {})),
        ("a.b:C([1, -2], x=None)", ("a.b:C", [[1, -2]], {"x": None})),
    ],
)
def test_calls_are_read(text, call):
    assert read_call(text) == call


@pytest.mark.parametrize(
    "text", ["", "X(", "X)", "X(a=b)", "X(f())", "X(**{})", "X(*[])", "X()()", "X(1) + 1", "X Y", "os.system('x')(1)"]
)
def test_only_names_with_literals_are_calls(text):
    with pytest.raises(ValueError, match="not a name with literal values"):
        read_call(text)


def test_nearest():
    assert nearest("infobatch", ["InfoBatch", "EMA"]) == "Did you mean 'InfoBatch'? Known: EMA, InfoBatch."
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
    assert nearest("x", []) == "Known: none."
    many = [f"name{i}" for i in range(50)]
    assert nearest("name7", many) == "Did you mean 'name7'?"
    assert nearest("zzz", many) == "None of the 50 known names is similar."
