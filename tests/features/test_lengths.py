import datasets
import pytest
import torch

from hf_accel import LengthGrouped
from hf_accel.features import lengths
from hf_accel.features.lengths import padding_share

ROWS = [[1] * n for n in (3, 1, 4, 1, 5, 9, 2, 6)]
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]


def example_lengths(dataset, *columns):
    return lengths.example_lengths(dataset, *columns, asking=LengthGrouped(), remedy="Do this.")


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
    with pytest.raises(ValueError, match=r"LengthGrouped\(.*\): .*train_dataset \(IterableDataset\).* Do this"):
        example_lengths(stream, "input_ids")


def test_padding_share():
    assert padding_share(torch.tensor([4, 2, 3]), 2) == pytest.approx(1 - 9 / 11)
