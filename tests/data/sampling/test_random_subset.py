from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hf_accel.data.sampling.random_subset import RandomSubset, subset_of_epoch
from hf_accel.testing import tiny_trainer

SIZES = [(10, 5), (10, 3), (10, 7), (7, 7), (12, 1), (9, 4), (5, 2), (64, 32), (11, 8), (13, 6), (1, 1)]


@pytest.mark.parametrize(("num_examples", "size"), SIZES)
def test_every_example_comes_once_in_a_round(num_examples, size):
    epochs = [subset_of_epoch(e, num_examples, size, seed=3).tolist() for e in range(5 * num_examples)]
    counts = Counter()
    for number, ids in enumerate(epochs, 1):
        assert ids == sorted(set(ids)) and len(ids) == size and 0 <= ids[0] and ids[-1] < num_examples
        counts.update(ids)
        # Whole rounds are the same for all; of the present one an example has had its turn or not.
        rounds = number * size // num_examples
        assert {counts[i] for i in range(num_examples)} <= {rounds, rounds + 1}
        if number * size % num_examples == 0:
            assert set(counts.values()) == {rounds}


def test_rounds_and_seeds_differ_and_epochs_are_recomputed():
    def run(seed):
        return [subset_of_epoch(e, 40, 12, seed).tolist() for e in range(20)]

    assert run(0) == run(0) != run(1)
    assert subset_of_epoch(17, 40, 12, 0).tolist() == run(0)[17]
    assert len({tuple(ids) for ids in run(0)}) == 20


@pytest.mark.parametrize(("num_examples", "size"), [(6, 2), (6, 4)])
def test_every_subset_is_as_likely(num_examples, size):
    """Also of epochs that lie across two rounds: pairs of examples meet equally often (chi-square over seeds)."""
    for epoch in (1, 2, 4):
        met = Counter()
        trials = 1500
        for seed in range(trials):
            ids = subset_of_epoch(epoch, num_examples, size, seed).tolist()
            met.update((a, b) for a in ids for b in ids if a < b)
        expected = trials * size * (size - 1) / 2 / 15
        assert sum((met[a, b] - expected) ** 2 / expected for a in range(6) for b in range(a + 1, 6)) < 60


def test_the_trainer_sees_each_round(tmp_path):
    seen = []

    class Watched(RandomSubset):
        def observe(self, ids_B, losses_B):
            seen.extend(ids_B.tolist())

    trainer = tiny_trainer([Watched(keep=0.25)], tmp_path, num_train_epochs=4)
    trainer.train()
    assert sorted(seen) == list(range(64))
    assert trainer.receipt.samples == 64 and trainer.receipt.techniques[0]["report"] == {"kept": 0.25}


def test_a_share_of_one_keeps_all_and_a_bad_one_names_itself():
    technique = RandomSubset(keep=1.0)
    technique.run_ = SimpleNamespace(stream=SimpleNamespace(seed=0))
    ids, weights = technique.select(3, 10, torch.Generator())
    assert ids.tolist() == list(range(10)) and weights is None
    with pytest.raises(ValueError, match="RandomSubset\\(keep=0"):
        RandomSubset(keep=0)


def test_sizes_that_divide_the_data_keep_their_choice():
    """Recorded before an epoch took two permutations at most."""
    assert [subset_of_epoch(e, 8, 4, 3).tolist() for e in range(4)] == [
        [0, 3, 4, 6],
        [1, 2, 5, 7],
        [1, 3, 4, 7],
        [0, 2, 5, 6],
    ]
    assert [subset_of_epoch(e, 9, 3, 1).tolist() for e in (0, 4, 8)] == [[2, 5, 8], [0, 2, 4], [0, 1, 7]]


def test_a_late_epoch_takes_two_permutations(monkeypatch):
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or randperm(*args, **kwargs))
    for size in (500, 300, 900):
        for epoch in (0, 20, 1000):
            drawn.clear()
            subset_of_epoch(epoch, 997, size, 0)
            assert len(drawn) <= 2
