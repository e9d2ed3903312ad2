from collections import defaultdict

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from hf_accel import WeightedSampling
from hf_accel.batch import MicroBatch, StepPlan, earlier_occurrences
from hf_accel.features.augmentation import generators
from hf_accel.preserve import keyed_random, seed_all
from hf_accel.stream.indexed import Slots, StepStream


class Noisy(Dataset):
    """A new image at every reading: four classes, the last one of a single example."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"label": min(index // 3, 3), "noise": torch.rand(())}


def stream(micro_batch_size, rank=0, world=1, workers=0):
    technique = WeightedSampling()
    technique.inspect_dataset(Noisy())
    return StepStream(
        Noisy(),
        default_collate,
        batch_size=8,
        micro_batch_size=micro_batch_size,
        seed=3,
        rank=rank,
        world=world,
        slots=Slots(select=technique),
        loader={"num_workers": workers},
    )


def drawn(streams, epochs=3):
    """Of each epoch and example, the noise that was read and the numbers that augmentations drew."""
    found = defaultdict(list)
    for one in streams:
        for epoch in range(epochs):
            one.set_epoch(epoch)
            for batch in one:
                for micro in batch.real_micro_batches:
                    own = [generator.random() for generator in generators(WeightedSampling(), batch.plan, micro)]
                    for i, noise, number in zip(micro.ids_B.tolist(), micro.inputs["noise"].tolist(), own, strict=True):
                        found[epoch, i].append((noise, number))
    return {key: sorted(values) for key, values in found.items()}


def test_an_example_that_comes_again_is_drawn_for_again():
    found = drawn([stream(8)])
    assert max(map(len, found.values())) >= 3
    for values in found.values():
        assert len({noise for noise, _ in values}) == len({number for _, number in values}) == len(values)


@pytest.mark.parametrize("streams", [[stream(3)], [stream(3, rank, 2) for rank in range(2)], [stream(8, workers=1)]])
def test_neither_micro_batches_nor_ranks_nor_workers_matter(streams):
    assert drawn(streams) == drawn([stream(8)])


def test_a_stream_that_is_resumed_draws_the_same():
    whole, part, resumed = stream(8), stream(8), stream(8)
    whole.set_epoch(0)
    part.set_epoch(0)
    batches = iter(part)
    next(batches)
    resumed.load_state_dict(part.state_dict())
    resumed.set_epoch(0)
    expected = [micro.inputs["noise"].tolist() for batch in whole for micro in batch.micro_batches][1:]
    assert [micro.inputs["noise"].tolist() for batch in resumed for micro in batch.micro_batches] == expected


def test_first_occurrences_keep_their_key():
    plan = StepPlan(2, torch.tensor([4, 4]), None, 2, seed=3, repeats_N=torch.tensor([0, 1]))
    once = StepPlan(2, torch.tensor([4]), None, 2, seed=3)
    both, single = (
        [g.random() for g in generators(WeightedSampling(), p, MicroBatch({}, p.ids_N, None, p.repeats_N))]
        for p in (plan, once)
    )
    assert both[0] == single[0] != both[1]
    with keyed_random():
        values = [(seed_all(3, 2, 4, *repeat), torch.rand(()).item())[1] for repeat in ((), (0,), (1,))]
    assert values[0] == values[1] != values[2]


def test_occurrences_are_counted():
    assert earlier_occurrences(torch.tensor([5, 2, 5, 5, 0, 2])).tolist() == [0, 0, 1, 2, 0, 1]
    assert earlier_occurrences(torch.tensor([5, 2, 0])) is None
    assert earlier_occurrences(torch.empty(0, dtype=torch.int64)) is None


def test_examples_that_a_step_chooses_twice_have_two_keys():
    plan = StepPlan(0, torch.tensor([7, 3, 7]), None, 4, repeats_N=torch.tensor([0, 0, 1]))
    chosen = plan.chosen(torch.tensor([0, 0, 2, 1]), torch.ones(4))
    keys = list(zip(chosen.ids_N.tolist(), chosen.repeats_N.tolist(), strict=True))
    assert chosen.ids_N.tolist() == [7, 7, 7, 3] and len(set(keys)) == 4
    assert keys[0] == (7, 0) and keys[2] == (7, 1) and keys[3] == (3, 0)
    assert StepPlan(0, torch.tensor([7, 3]), None, 4).chosen(torch.tensor([1]), None).repeats_N is None
