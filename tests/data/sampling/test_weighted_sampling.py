import math
from collections import Counter

import datasets
import pytest
import torch

from hf_accel.data.sampling.score_pruning import ScorePruning
from hf_accel.data.sampling.weighted_sampling import WeightedSampling, draw_with_replacement
from hf_accel.testing import CountingText, tiny_trainer

ROWS = datasets.Dataset.from_dict(
    {
        "label": [0] * 90 + [1] * 9 + [2],
        "source": ["web"] * 50 + ["code"] * 50,
        "weight": [0.0] * 50 + [1.0] * 25 + [3.0] * 25,
        "input_ids": [[1, 2]] * 100,
    }
)


def drawn(technique, dataset=ROWS, epochs=300):
    """How often each example was drawn in some epochs."""
    technique.inspect_dataset(dataset)
    counts = torch.zeros(len(dataset))
    for epoch in range(epochs):
        ids, weights = technique.select(epoch, len(dataset), torch.Generator().manual_seed(epoch))
        assert len(ids) == len(dataset) and (ids.diff() >= 0).all() and weights is None
        counts += torch.bincount(ids, minlength=len(dataset))
    return counts


def shares(counts, column):
    total = Counter()
    for value, count in zip(ROWS[column], counts.tolist(), strict=True):
        total[value] += count / float(counts.sum())
    return dict(total)


def close(found, expected, draws=30_000):
    """Within four standard errors of a share."""
    return all(abs(found[k] - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1e-12 for k, p in expected.items())


def test_classes_are_balanced():
    assert close(shares(drawn(WeightedSampling()), "label"), {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})


def test_sources_are_mixed_by_their_shares():
    technique = WeightedSampling(by="source", weights={"web": 8, "code": 2})
    assert close(shares(drawn(technique), "source"), {"web": 0.8, "code": 0.2})


def test_examples_follow_their_weights():
    counts = drawn(WeightedSampling(by="weight", weights="column"))
    assert counts[:50].sum() == 0
    assert close({"heavy": float(counts[75:].sum() / counts.sum())}, {"heavy": 0.75})


def test_draws_are_in_proportion_whatever_is_zero():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    counts = torch.bincount(draw_with_replacement(weights, 40_000, torch.Generator().manual_seed(0)), minlength=6)
    expected = 40_000 * weights / 4
    assert counts[weights == 0].sum() == 0
    assert ((counts - expected)[weights > 0] ** 2 / expected[weights > 0]).sum() < 14  # chi-square, 2 degrees


def test_copies_of_an_example_do_not_lie_side_by_side(tmp_path):
    """One class of a single example is a third of the draws, and of nearly every step."""
    labels = [0, *[1] * 31, *[2] * 32]

    class Watched(WeightedSampling):
        def transform_batch(self, batch):
            steps.append(int((batch.plan.ids_N == 0).sum()))
            return batch

    steps = []
    trainer = tiny_trainer([Watched()], tmp_path, num_train_epochs=6)
    trainer.train_dataset.labels = labels
    trainer.train()
    assert len(steps) == 48 and 100 < sum(steps) < 156 and max(steps) < 8
    assert sum(count > 0 for count in steps) > 40


@pytest.mark.parametrize("swapped", [False, True])
def test_what_another_technique_leaves_out_is_not_weighed(swapped, tmp_path):
    techniques = [WeightedSampling(), ScorePruning("column:score", keep=0.5)]
    trainer = tiny_trainer(techniques[::-1] if swapped else techniques, tmp_path)
    trainer.train()
    left = [CountingText().labels[i] for i in techniques[1].ids_N_.tolist()]
    weights = [1 / left.count(label) for label in left]
    assert techniques[0].weights_N_.tolist() == weights and trainer.receipt.samples == 3 * 32


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"by": "class"}, r"no column 'class', only 'label', 'source', 'weight', 'input_ids'"),
        ({"by": "input_ids"}, r"lists in the column 'input_ids'"),
        ({"weights": {0: 1.0, 1: 1.0}}, r"no share of 2"),
        ({"weights": {0: 1, 1: 1, 2: 1, 3: 1}}, r"no example has 'label' = 3"),
        ({"by": "source", "weights": "column"}, r"the weight 'web' of 0"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=f"WeightedSampling.*{sentence}"):
        WeightedSampling(**fields).inspect_dataset(ROWS)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": 0.0}, "sum to zero"),
        ({"a": -1.0, "b": 2.0}, "-1.0 of 'a'"),
        ({"a": math.nan}, "nan of 'a'"),
        ("equal", "weights must be 'balanced', 'column'"),
    ],
)
def test_bad_weights_are_refused(weights, sentence):
    with pytest.raises(ValueError, match=f"WeightedSampling.*{sentence}"):
        WeightedSampling(weights=weights)


@pytest.mark.parametrize(("values", "sentence"), [([0.0, 0.0], "zero"), ([1.0, None], "None"), ([1.0, -1.0], "-1.0")])
def test_bad_weights_in_a_column_are_refused(values, sentence):
    table = datasets.Dataset.from_dict({"w": values})
    with pytest.raises(ValueError, match=f"WeightedSampling.*{sentence}"):
        WeightedSampling(by="w", weights="column").inspect_dataset(table)


def test_rows_without_a_class_are_refused():
    with pytest.raises(ValueError, match=r"WeightedSampling\(.*\) does not support None in the column 'label'"):
        WeightedSampling().inspect_dataset([{"label": label} for label in (0, None, 1)])
