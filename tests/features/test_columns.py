import datasets
import numpy as np
import pytest
import torch

from hf_accel.batch import StepPlan
from hf_accel.data.sampling import Coreset, WeightedSampling
from hf_accel.features.columns import column, column_chunks, numbers
from hf_accel.features.static_subset import rows_of
from hf_accel.stream.reader import StepReader

ASKING = WeightedSampling()


def test_a_column_is_read_from_any_map_style_data_set():
    values = [3, 1, 2]
    table = datasets.Dataset.from_dict({"a": values, "b": ["x"] * 3})
    assert column(table, "a", ASKING) == values
    assert column(table.with_format("torch"), "a", ASKING) == values
    assert column(table.select([2, 0]), "a", ASKING) == [2, 3]
    for convert in (int, torch.tensor, np.array, np.int64):
        assert column([{"a": convert(value)} for value in values], "a", ASKING) == values
    assert column([{"a": torch.arange(2)}, {"a": np.arange(1)}], "a", ASKING) == [[0, 1], [0]]
    assert [len(chunk) for chunk in column_chunks(table, "a", ASKING, rows=2)] == [2, 1]


def test_numbers_may_lack_but_be_nothing_else():
    table = datasets.Dataset.from_dict({"a": [1, None], "b": ["x", "y"]})
    assert numbers(table, "a", ASKING).tolist()[0] == 1.0 and numbers(table, "a", ASKING)[1].isnan()
    with pytest.raises(ValueError, match="WeightedSampling.*'x' in the column 'b'"):
        numbers(table, "b", ASKING)


def test_rows_without_columns_are_refused():
    with pytest.raises(ValueError, match=r"Coreset\(keep=0.5, column=None\).*does not support examples that are lists"):
        column([[1, 2]], "a", Coreset())


def test_rows_of_a_subset_are_read_with_their_own_key():
    """A random transform of the data set draws the same for an example, whatever it is read together with."""

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"value": torch.rand(())}

    reader = StepReader(rows_of(Noisy(), torch.tensor([1, 4, 7])), torch.utils.data.default_collate)

    def values(*ids):
        plan = StepPlan(0, torch.tensor(ids), None, 8, seed=3)
        return reader[plan].micro_batches[0].inputs["value"].tolist()

    assert values(0, 1, 2)[1:] == values(1, 2) and len(set(values(0, 1, 2))) == 3


def test_a_table_stays_a_table():
    table = datasets.Dataset.from_dict({"a": [3, 1, 2]})
    assert rows_of(table, torch.tensor([0, 2]))["a"][:] == [3, 2]
    assert [row["a"] for row in rows_of([{"a": 3}, {"a": 1}], torch.tensor([1]))] == [1]
