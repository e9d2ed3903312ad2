import datasets
import pytest
import torch

from hf_accel import LengthGrouped
from hf_accel.features import lengths
from hf_accel.features.lengths import padding_share

ROWS = [[1] * n for n in (3, 1, 4, 1, 5, 9, 2, 6)]
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]


def lengths_of(dataset, *columns):
    return lengths.example_lengths(dataset, *columns, asking=LengthGrouped(), remedy="Do this.")


def example_lengths(dataset, *columns):
    return lengths_of(dataset, *columns).longest_N


def test_lengths_are_those_of_the_rows():
    table = datasets.Dataset.from_dict({"input_ids": ROWS, "words": LENGTHS[::-1]})
    assert example_lengths(table, "input_ids").tolist() == LENGTHS
    assert example_lengths(table, "words").tolist() == LENGTHS[::-1]
    assert example_lengths(table.select([5, 0]), "length", "input_ids").tolist() == [9, 3]
    assert example_lengths(table.rename_column("words", "length"), "length", "input_ids").tolist() == LENGTHS[::-1]
    assert example_lengths([{"input_ids": torch.tensor(row)} for row in ROWS], "input_ids").tolist() == LENGTHS
    assert example_lengths([{"length": n} for n in LENGTHS], "length").dtype == torch.int64
    fixed = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=2)})
    assert example_lengths(datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 3}, fixed), "input_ids").tolist() == [
        2,
        2,
        2,
    ]


def test_a_missing_column_names_the_others():
    message = r"LengthGrouped\(.*\): .*no column 'length' or 'input_ids', only 'text', 'label'\. Do this"
    with pytest.raises(ValueError, match=message):
        example_lengths(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}), "length", "input_ids")


def test_a_stream_has_none_beforehand():
    stream = datasets.Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"LengthGrouped\(.*\) does not support IterableDataset as train_dataset.* Do this"
    ):
        example_lengths(stream, "input_ids")


def test_padding_share():
    found = lengths_of([{"length": n} for n in (3, 4, 2)], "length")
    assert padding_share(found, torch.tensor([1, 2, 0]), 2) == pytest.approx(1 - 9 / 11)
    empty = lengths_of([{"input_ids": []}] * 2, "input_ids")
    assert padding_share(empty, torch.arange(2), 2) == 0.0


CHOICES = [[[5] * 3, [5] * 7], [[5], [5] * 2], [[5] * 4, [5] * 4]]


@pytest.mark.parametrize("convert", [list, datasets.Dataset.from_list], ids=["list", "table"])
def test_an_example_of_several_rows_is_as_long_as_its_longest(convert):
    found = lengths_of(convert([{"input_ids": rows} for rows in CHOICES]), "input_ids")
    assert [value.tolist() for value in found] == [[7, 2, 4], [10, 3, 8], [7, 2, 4], [2, 2, 2]]
    # Two examples in a batch: 4 rows of 7, then 2 rows of 4; 21 of these 36 positions are tokens.
    assert padding_share(found, torch.arange(3), 2) == pytest.approx(1 - 21 / 36)
    assert example_lengths(convert([{"input_ids": [[1] * n]} for n in (3, 50, 7)]), "input_ids").tolist() == [3, 50, 7]


def test_tensors_of_one_row_have_its_length():
    assert example_lengths([{"input_ids": torch.ones(1, n)} for n in (3, 50, 7)], "input_ids").tolist() == [3, 50, 7]
    features = datasets.Features({"input_ids": datasets.Array2D((1, 5), "int64")})
    table = datasets.Dataset.from_dict({"input_ids": [[[1] * 5]] * 2}, features)
    assert example_lengths(table, "input_ids").tolist() == [5, 5]


@pytest.mark.parametrize("convert", [list, datasets.Dataset.from_list], ids=["list", "table"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_in_the_data_set_is_not_length(convert, side):
    rows = [{"input_ids": [7] * n + [0] * (9 - n), "attention_mask": [1] * n + [0] * (9 - n)} for n in LENGTHS]
    if side == "left":
        rows = [{name: row[::-1] for name, row in both.items()} for both in rows]
    found = lengths_of(convert(rows), "input_ids")
    assert found.longest_N.tolist() == found.tokens_N.tolist() == LENGTHS
    assert found.width_N.tolist() == [9] * 8
    assert padding_share(found, torch.arange(8), 4) == pytest.approx(1 - 31 / 72)
    tokens = list(lengths.token_rows(convert(rows), LengthGrouped()))
    assert [row.tolist() for row in tokens] == [[7] * n for n in LENGTHS]


def test_lengths_may_be_seconds():
    seconds = [0.3, 0.9, 2.7]
    for dataset in ([{"length": s} for s in seconds], datasets.Dataset.from_dict({"length": seconds})):
        assert example_lengths(dataset, "length").tolist() == seconds
    assert example_lengths([{"length": 3.0}, {"length": 4.0}], "length").tolist() == [3, 4]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("length", [3, None, 4], "None"),
        ("length", [3, -1, 4], "-1"),
        ("length", [3.0, float("nan"), 4.0], "nan"),
        ("length", [3.0, float("inf"), 4.0], "inf"),
        ("length", [3, 2**62, 4], str(2**62)),
        ("length", ["3", "4", "5"], "string"),
        ("input_ids", [[1], None, [1, 2]], "None"),
        ("input_ids", [[[1], None], [[1], [2]]], "None"),
    ],
)
@pytest.mark.parametrize("convert", [list, datasets.Dataset.from_list], ids=["list", "table"])
def test_what_is_no_length_is_refused(column, values, said, convert):
    with pytest.raises(ValueError, match=rf"LengthGrouped\(.*\) does not support .*{said}"):
        lengths_of(convert([{column: value} for value in values]), "length", "input_ids")


def test_values_of_several_kinds_are_refused():
    with pytest.raises(ValueError, match=r"LengthGrouped\(.*'length'"):
        lengths_of([{"length": 3}, {"length": "four"}], "length")
    with pytest.raises(ValueError, match=r"LengthGrouped\(.*'length'"):
        lengths_of([{"length": 10**30}], "length")
