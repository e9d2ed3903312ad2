import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.batch import StepPlan, split_step
from hf_accel.stream.indexed import Slots, StepStream
from hf_accel.technique import Technique


class Numbers(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"x": i, "noise": torch.rand(()).item() + random.random() + float(np.random.rand())}


def collate(features):
    return {key: torch.tensor([f[key] for f in features]) for key in features[0]}


class Growing(Technique):
    """One more example at each step."""

    def __init__(self):
        self.size = 0

    def batch(self, upcoming_ids_N, batch_size):
        self.size = self.size % 5 + 1
        return self.size


class Odd(Technique):
    def __init__(self):
        pass

    def select(self, epoch, num_examples, generator):
        ids = torch.arange(1, num_examples, 2)
        return ids, torch.rand(len(ids), generator=generator) + 0.5


def stream(n=23, **kw):
    kw = {"batch_size": 6, "micro_batch_size": 4, "seed": 3} | kw
    return StepStream(Numbers(n), collate, **kw)


def content(batch):
    return [{k: v.tolist() for k, v in m.inputs.items()} | {"ids": m.ids_B.tolist()} for m in batch.micro_batches]


def epoch(s, e):
    s.set_epoch(e)
    return [content(b) for b in s]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))
def test_ranks_share_a_step_without_loss_or_repetition(n, micro, world):
    parts = [split_step(n, micro, rank, world) for rank in range(world)]
    assert sorted(i for rank in parts for row in rank for i in row) == list(range(n))
    assert len({len(rank) for rank in parts}) == 1
    assert all(len(row) <= micro for rank in parts for row in rank)
    if world == 1:
        assert [i for row in parts[0] for i in row] == list(range(n))


@pytest.mark.parametrize("micro, world", [(1, 2), (4, 2), (3, 4)])
def test_every_rank_knows_whether_some_rank_has_a_filler(micro, world):
    for n in range(1, 3 * micro * world):
        plans = [StepPlan(0, torch.arange(n), None, micro, rank, world) for rank in range(world)]
        filled = any(int(ids[0]) < 0 for plan in plans for ids, *_ in plan.micro_batches())
        assert all(plan.has_dummy_micro_batches is filled for plan in plans), n


def test_ranks_without_an_example_get_a_filler_that_counts_nothing():
    plans = [StepPlan(0, torch.tensor([5]), None, 4, rank, 3) for rank in range(3)]
    assert [plan.micro_batches()[0][0].tolist() for plan in plans] == [[5], [-1], [-1]]
    assert plans[1].micro_batches()[0][1].tolist() == [0.0]


def test_the_order_is_the_one_trainer_draws():
    found = [i for batch in epoch(stream(), 2) for micro in batch for i in micro["x"]]
    assert found == torch.randperm(23, generator=torch.Generator().manual_seed(3 + 2)).tolist()


def test_chosen_examples_keep_their_order_and_their_weights():
    s = stream(slots=Slots(select=Odd()))
    full = torch.randperm(23, generator=torch.Generator().manual_seed(3)).tolist()
    s.set_epoch(0)
    batches = list(s)
    ids = [i for b in batches for m in b.micro_batches for i in m.ids_B.tolist()]
    assert ids == [i for i in full if i % 2]
    weights = {
        i: w
        for b in batches
        for m in b.micro_batches
        for i, w in zip(m.ids_B.tolist(), m.weights_B.tolist(), strict=True)
    }
    chooser = torch.Generator().manual_seed((3 * 1_000_003) * 2 + 1)
    assert [weights[i] for i in range(1, 23, 2)] == (torch.rand(11, generator=chooser) + 0.5).tolist()


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    s = stream()
    s.set_epoch(0)
    next(iter(s))
    drawn = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # the loader's own seed, drawn by Trainer's loader as well
    random.seed(0)
    np.random.seed(0)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("slots", [{}, {"batch": Growing}, {"select": Odd}, {"batch": Growing, "select": Odd}])
def test_resumes_at_every_step_with_the_same_batches(slots, workers):
    loader = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    straight = stream(slots=Slots(**{k: v() for k, v in slots.items()}), loader=loader)
    expected = [epoch(straight, 0), epoch(straight, 1)]
    for stop in (1, 2, len(expected[0])):
        first = stream(slots=Slots(**{k: v() for k, v in slots.items()}), loader=loader)
        first.set_epoch(0)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        state = first.state_dict()
        second = stream(slots=first.slots, loader=loader)
        second.load_state_dict(state)
        if stop == len(expected[0]):
            assert second.epoch_is_over
        else:
            assert epoch(second, 0) == expected[0][stop:]
            assert epoch(second, 1) == expected[1]


class Sorted(Technique):
    """Sorts by a key within batches' worth of examples, so that the order depends on the size of a batch."""

    def __init__(self):
        pass

    def order(self, ids_N, batch_size, generator):
        shuffled_N = ids_N[torch.randperm(len(ids_N), generator=generator)]
        return torch.cat([part.sort().values for part in shuffled_N.split(2 * batch_size)])


@pytest.mark.parametrize("sizes", [(4, 8, 6), (6, 4, 12)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_resumed_at_other_batch_sizes_reads_each_example_once(sizes, drop_last):
    whole = stream(batch_size=sizes[0], slots=Slots(order=Sorted()), drop_last=drop_last)
    expected = sorted(i for batch in epoch(whole, 0) for micro in batch for i in micro["ids"])
    read, state = [], None
    for size in sizes:
        part = stream(batch_size=size, slots=Slots(order=Sorted()), drop_last=drop_last)
        if state is not None:
            part.load_state_dict(state)
        part.set_epoch(0)
        for batch in part:
            read += [i for micro in content(batch) for i in micro["ids"]]
            if size != sizes[-1]:  # goes on with the next size after one step
                break
        state = part.state_dict()
    assert sorted(read) == expected


def test_randomness_does_not_depend_on_ranks_or_micro_batches():
    def noises(**kw):
        return {
            i: noise
            for rank in range(kw.get("world", 1))
            for b in epoch(stream(**kw, rank=rank), 0)
            for m in b
            for i, noise in zip(m["ids"], m["noise"], strict=True)
            if i >= 0
        }

    assert noises() == noises(micro_batch_size=2) == noises(world=2) == noises(loader={"num_workers": 1})


def test_every_epoch_draws_anew_for_every_example():
    def noises(number):
        batches = epoch(stream(micro_batch_size=1), number)
        return {i: noise for b in batches for m in b for i, noise in zip(m["ids"], m["noise"], strict=True)}

    first, second = noises(0), noises(1)
    assert first == noises(0) and first.keys() == second.keys()
    assert all(first[i] != second[i] for i in first) and len(set(first.values())) == len(first)


def test_epochs_count_as_trainer_counts_them():
    s = stream(n=20)
    s.set_epoch(1)
    seen = []
    for _ in s:
        seen.append(s.epochs)
    assert seen == [1 + 1 / 4, 1 + 2 / 4, 1 + 3 / 4, 2.0]
    assert s.epoch_is_over


def test_other_data_is_refused():
    s = stream()
    s.set_epoch(0)
    with pytest.raises(ValueError, match="23 examples, the checkpoint's had 23|has 22 examples"):
        stream(n=22).load_state_dict(s.state_dict())
    with pytest.raises(ValueError, match="no examples"):
        stream(n=0)


def test_a_plan_holds_its_own_examples_only():
    """Workers are sent the whole storage of a tensor."""
    s = stream(1000, slots=Slots(select=Odd()))
    s.set_epoch(0)
    plan = next(s.draw())
    for tensor in (plan.ids_N, plan.weights_N):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and len(tensor) == 6


def test_steps_of_several_micro_batches_are_not_read_far_ahead():
    for micro, asked, expected in ((6, None, 2), (2, None, 1), (2, 3, 3)):
        loader = stream(micro_batch_size=micro, loader={"num_workers": 1, "prefetch_factor": asked}).loader
        assert loader.prefetch_factor == expected
    assert stream(micro_batch_size=2, loader={"prefetch_factor": None}).loader.prefetch_factor is None
