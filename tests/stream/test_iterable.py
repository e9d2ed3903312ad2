"""Streams: what Trainer trains on, resumed at every step, on any number of ranks; what they cannot serve is refused."""

from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_accel import (
    AccelTrainer,
    BatchSizeRamp,
    Budget,
    Coreset,
    Deduplicate,
    InfoBatch,
    LengthGrouped,
    Mixup,
    RandomErasing,
    RandomSubset,
    ScorePruning,
    SelectiveBackprop,
    SequenceLengthWarmup,
    Technique,
)
from hf_accel.stream.indexed import Slots
from hf_accel.stream.iterable import IterableStepStream, digest
from hf_accel.testing import (
    PROBES,
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)

NUM = 28


class Text(IterableDataset):
    """The first rows of `CountingText`, in another order at each epoch."""

    def __init__(self, num=NUM, shuffled=True):
        self.rows, self.epoch, self.shuffled, self.reads = CountingText(num), 0, shuffled, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.rows))
        for i in order if self.shuffled else range(len(self.rows)):
            self.reads += 1
            yield self.rows[int(i)]


def table(num=NUM):
    return datasets.Dataset.from_list([CountingText(num)[i] for i in range(num)])


SOURCES = {
    "torch": Text,
    "datasets": lambda: table().to_iterable_dataset(num_shards=4),
    "mapped": lambda: table().to_iterable_dataset(num_shards=3).map(lambda row: row | {"label": 0}).skip(2),
    "shuffled": lambda: table().to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=16),
}


def hosted(techniques, directory, source, trainer_class=AccelTrainer, **args):
    args = tiny_trainer([], directory, **({"max_steps": 7} | args)).args
    if any("budget" in t.implemented_hooks() for t in techniques):
        args.max_steps = -1
    hosting = {"techniques": techniques} if trainer_class is AccelTrainer else {}
    model, collator = tiny_llama(), collate_padded
    trainer = trainer_class(model=model, args=args, train_dataset=source, data_collator=collator, **hosting)
    trainer.pop_callback(PrinterCallback)
    return trainer


@dataclass(eq=False)
class Watch(Technique):
    """Sees every example's loss and changes nothing."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen_ = []

    def observe(self, ids_B, losses_B):
        self.seen_ += list(zip(ids_B.tolist(), losses_B.tolist(), strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_a_watched_stream_is_trainers(source, tmp_path):
    plain = hosted([], tmp_path, SOURCES[source](), trainer_class=Trainer)
    plain.train()
    ours = hosted([watch := Watch()], tmp_path, SOURCES[source]())
    ours.train()
    assert losses_of(ours) == losses_of(plain)
    assert largest_difference(weights_of(ours), weights_of(plain)) == 0.0
    num = NUM - 2 * (source == "mapped")
    assert [i for i, _ in watch.seen_] == [i % num for i in range(len(watch.seen_))]
    assert ours.receipt.samples == len(watch.seen_) == num + 3 * 8


@pytest.mark.parametrize("limit", ["9steps", "60samples"])
def test_a_budget_alone_begins_a_stream_again(limit, tmp_path):
    trainer = hosted([Budget(limit)], tmp_path, Text(20))
    trainer.train()
    assert trainer.stream is None and trainer.clock.progress == 1.0
    assert trainer.state.global_step == 9  # of 8, 8 and 4 examples, again and again


RESUMED = [
    (lambda: [Watch()], "torch", 0),
    (lambda: [Watch()], "mapped", 0),
    (lambda: [Watch()], "shuffled", 1),
    (lambda: [BatchSizeRamp()], "datasets", 1),
    (lambda: [SequenceLengthWarmup(max_length=24), SelectiveBackprop()], "shuffled", 0),
]


@pytest.mark.parametrize(("techniques", "source", "workers"), RESUMED)
def test_resumes_bit_exactly(techniques, source, workers, tmp_path):
    args = {"max_steps": 8, "dataloader_num_workers": workers}
    straight = hosted(techniques(), tmp_path, SOURCES[source](), save_strategy="steps", save_steps=1, **args)
    straight.train()
    assert straight.stream.epoch == 1
    for step in (3, 6):
        resumed = hosted(techniques(), tmp_path / "resumed", SOURCES[source](), **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(straight)
        assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
        assert resumed.receipt.techniques[0]["report"] == straight.receipt.techniques[0]["report"]


def numbers(features):
    return {name: torch.tensor([f[name] for f in features]) for name in features[0]}


class Counting(IterableDataset):
    """Its position and a random number, and how many it was asked for."""

    def __init__(self, num):
        self.num, self.reads = num, 0

    def __iter__(self):
        for i in range(self.num):
            self.reads += 1
            yield {"x": i, "noise": torch.rand(()).item() + float(np.random.rand())}


def stream(source, **kw):
    return IterableStepStream(source, numbers, **({"batch_size": 6, "micro_batch_size": 4, "seed": 3} | kw))


def content(batch):
    return [{k: v.tolist() for k, v in m.inputs.items()} | {"ids": m.ids_B.tolist()} for m in batch.micro_batches]


def epoch(s, e):
    s.set_epoch(e)
    return [content(b) for b in s]


class Sizes(Technique):
    """Steps of given sizes, each of which asks for no more than it sees."""

    def __init__(self, sizes):
        self.sizes, self.asked = sizes, []

    def batch(self, upcoming_ids_N, batch_size):
        self.asked.append(len(upcoming_ids_N))
        return self.sizes[int(upcoming_ids_N[0]) % len(self.sizes)]


@pytest.mark.parametrize("num", [1, 5, 6, 7, 12, 23, 24])
@pytest.mark.parametrize("sizes", [None, [1], [4, 7, 2], [50]])
def test_an_epoch_is_the_whole_stream_in_order(num, sizes):
    s = stream(Counting(num), slots=Slots(batch=None if sizes is None else Sizes(sizes)))
    for e in (0, 1):
        s.set_epoch(e)
        seen, over = [], []
        for batch in s:
            assert len(batch.plan.ids_N) <= (6 if sizes is None else max(sizes))
            assert content(s.read(batch.plan)) == content(batch)
            seen += [x for m in batch.micro_batches for x in m.inputs["x"].tolist()]
            over.append(s.epoch_is_over)
            assert s.epochs == (e + 1 if over[-1] else e)
        assert seen == list(range(num))
        assert over == [False] * (len(over) - 1) + [True]


def test_the_owner_of_batch_sees_more_where_it_wants_more():
    sizes = Sizes([13])
    s = stream(Counting(100), slots=Slots(batch=sizes))
    s.set_epoch(0)
    assert len(next(iter(s)).plan.ids_N) == 13
    assert sizes.asked == [12, 24]
    s = stream(Counting(10), slots=Slots(batch=Sizes([13])))
    assert [len(step[0]["x"]) + len(step[1]["x"]) + len(step[2]["x"]) for step in epoch(s, 0)] == [10]


def test_nothing_is_dropped_as_in_trainer(tmp_path):
    """Trainer's loader takes no ``drop_last`` for data without an index."""
    args = {"dataloader_drop_last": True, "max_steps": 6}
    plain = hosted([], tmp_path, Text(20), Trainer, **args)
    plain.train()
    ours = hosted([Watch()], tmp_path, Text(20), **args)
    ours.train()
    assert losses_of(ours) == losses_of(plain)
    assert ours.receipt.samples == 2 * 20
    accumulated = hosted(
        [watch := Watch()], tmp_path, Text(20), gradient_accumulation_steps=2, **args | {"max_steps": 4}
    )
    accumulated.train()
    assert [i for i, _ in watch.seen_] == 2 * list(range(20))


def test_randomness_does_not_depend_on_ranks_micro_batches_or_workers():
    def noises(**kw):
        return {
            x: noise
            for rank in range(kw.get("world", 1))
            for step in epoch(stream(Counting(23), **kw, rank=rank), 0)
            for m in step
            for x, i, noise in zip(m["x"], m["ids"], m["noise"], strict=True)
            if i >= 0
        }

    loader = {"num_workers": 1, "multiprocessing_context": "fork"}
    assert len(noises()) == 23
    assert noises() == noises(micro_batch_size=2) == noises(world=2) == noises(loader=loader)


def test_a_generator_of_the_data_is_seeded_for_each_epoch():
    class Drawn(IterableDataset):
        generator = torch.Generator()

        def __iter__(self):
            for i in torch.randperm(9, generator=self.generator).tolist():
                yield {"x": i}

    s = stream(Drawn())
    first, second, again = epoch(s, 0), epoch(s, 1), epoch(stream(Drawn()), 0)
    assert first == again != second


def test_collators_may_change_what_they_get():
    def greedy(features):
        return {"x": torch.tensor([f.pop("x") for f in features])}

    s = IterableStepStream(Counting(6), greedy, batch_size=6, micro_batch_size=6, seed=0)
    s.set_epoch(0)
    batch = next(iter(s))
    assert s.read(batch.plan).micro_batches[0].inputs["x"].tolist() == list(range(6))


def stopped(source, steps, **kw):
    s = stream(source, **kw)
    s.set_epoch(0)
    batches = iter(s)
    for _ in range(steps):
        next(batches)
    return s.state_dict()


def test_it_resumes_at_once_where_the_data_can_and_by_reading_where_it_cannot():
    read = []

    def watched(row):
        read.append(row["x"])
        return row

    plain = datasets.Dataset.from_dict({"x": range(100)}).to_iterable_dataset(num_shards=5).map(watched)
    state = stopped(plain, 12)
    assert state["start"]["position"] == 66 and state["consumed"] == 72
    read.clear()
    s = stream(plain)
    s.load_state_dict(state)
    assert [x for step in epoch(s, 0) for m in step for x in m["x"]] == list(range(72, 100))
    assert min(read) >= 60, "it began at the beginning"
    assert next(iter(plain))["x"] == 0, "the data set was left where it was resumed"

    source = Counting(100)
    state = stopped(source, 12)
    assert state["start"] == {"position": 0, "state": None}
    source.reads = 0
    s = stream(source)
    s.load_state_dict(state)
    assert [x for step in epoch(s, 0) for m in step for x in m["x"]] == list(range(72, 100))
    assert source.reads == 100


def test_a_state_that_is_not_exact_is_found_out(caplog):
    """``datasets``: arrow formats and batched maps together may skip a batch."""

    class Forgetful(datasets.IterableDataset):
        def load_state_dict(self, state_dict):
            pass

    plain = datasets.Dataset.from_dict({"x": range(100)}).to_iterable_dataset()
    state = stopped(plain, 5)
    forgetful = Forgetful(plain._ex_iterable)
    s = stream(forgetful)
    s.load_state_dict(state)
    assert [x for step in epoch(s, 0) for m in step for x in m["x"]] == list(range(30, 100))


def test_other_data_is_refused():
    state = stopped(Counting(100), 5)
    s = stream(Text())
    s.load_state_dict(state)
    with pytest.raises(ValueError, match="example 29 of epoch 0 differs from the one before the checkpoint"):
        epoch(s, 0)
    with pytest.raises(ValueError, match=r"train_dataset \(Counting\) has no index, but the checkpoint's had one"):
        stream(Counting(3)).load_state_dict({"epoch": 0, "consumed": 3})
    with pytest.raises(ValueError, match="train_dataset has no examples"):
        epoch(stream(Counting(0)), 0)


def test_examples_are_told_apart():
    array, image = np.arange(4), object()
    examples = [
        {"a": [1, 2]},
        {"a": [1, 3]},
        {"b": [1, 2]},
        {"a": torch.arange(4)},
        {"a": torch.arange(4).bfloat16() + 1},
        {"a": array.reshape(2, 2)},
        {"a": [array, array + 1]},
        {"a": "text", "i": image},
        ("text", 2.0),
    ]
    found = [digest(example) for example in examples]
    assert len(set(found)) == len(found)
    assert found == [digest(example) for example in examples]
    assert digest({"a": array}) == digest({"a": torch.arange(4)})


def test_a_stream_that_ends_for_good_ends_the_run(tmp_path):
    rows = iter([CountingText()[i] for i in range(20)])

    class Once(IterableDataset):
        def __iter__(self):
            return rows

    trainer = hosted([Watch()], tmp_path, Once(), max_steps=9)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.receipt.samples == 20
    assert trainer.clock.progress == pytest.approx(1 / 3)


def test_a_budget_that_is_not_in_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"Budget\(limit='2epochs'\): train_dataset \(Text\) has no length"):
        hosted([Budget("2epochs"), Watch()], tmp_path, Text())
    for limit, steps in (("90samples", 13), ("7steps", 7)):
        budgeted = hosted([Budget(limit), Watch()], tmp_path, Text())
        budgeted.train()
        assert budgeted.state.global_step == steps and budgeted.clock.progress == 1.0
        assert budgeted.receipt.final_learning_rate == 0.0


def test_a_stream_with_a_length_has_epochs(tmp_path):
    class Known(Text):
        def __len__(self):
            return NUM

    trainer = hosted([Budget("1.5epochs"), Watch()], tmp_path, Known())
    trainer.train()
    assert trainer.receipt.samples == 28 + 16
    assert trainer.state.epoch == 1.5


REFUSALS = {
    "InfoBatch": (InfoBatch(), r"InfoBatch\(.*\) chooses examples by their index, which train_dataset \(Text\) l"),
    "RandomSubset": (RandomSubset(), r"RandomSubset\(.*\) chooses examples by their index"),
    "LengthGrouped": (LengthGrouped(), r"LengthGrouped\(.*\) chooses examples by their index"),
    "ScorePruning": (ScorePruning(), r"ScorePruning\(.*\) does not support Text .* chooses examples by index"),
    "Coreset": (Coreset(), r"Coreset\(.*\) does not support Text .* chooses examples by index"),
    "Deduplicate": (Deduplicate(), r"Deduplicate\(.*\) does not support Text .* chooses examples by index"),
    "SequenceLengthWarmup": (SequenceLengthWarmup(), r"SequenceLengthWarmup\(.*\) does not support Text .*max_length"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_an_index_is_refused_by_name(name, tmp_path):
    technique, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        hosted([technique], tmp_path, Text()).train()


class Images(IterableDataset):
    """The images of the contract's probe, one after the other."""

    def __iter__(self):
        examples = PROBES["image"].examples(NUM, 0, torch.float32)
        yield from (examples[i] for i in range(NUM))


def test_images_are_mixed_and_resumed_bit_exactly(tmp_path):
    def train(directory, resume=None):
        trainer = tiny_trainer([RandomErasing(), Mixup()], directory, max_steps=8, save_strategy="steps", save_steps=5)
        trainer.train_dataset = Images()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train(tmp_path / "straight")
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-5"))
    assert straight.stream.epoch == 1 and isinstance(straight.stream, IterableStepStream)
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    assert all(t.took_effect(t.report()) for t in straight.techniques)


def test_goes_on_where_a_plain_trainer_was(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    plain = hosted([], tmp_path, table().to_iterable_dataset(), Trainer, **args)
    plain.train()
    resumed = hosted([Watch()], tmp_path / "resumed", table().to_iterable_dataset(), **args)
    resumed.accel.options.allow_changes = True
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(plain)
    assert largest_difference(weights_of(resumed), weights_of(plain)) == 0.0


class Looks(TrainerCallback):
    """Looks into the loader of the run at its second step, and asks for another one."""

    def __init__(self):
        self.trainer, self.shapes = None, []

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step == 2:
            for loader in (train_dataloader, self.trainer.get_train_dataloader()):
                self.shapes += [len(batch["input_ids"]) for batch, _ in zip(loader, range(3), strict=False)]


@pytest.mark.parametrize("source", ["torch", "datasets", "shuffled", "indexed"])
def test_a_look_into_the_loader_does_not_disturb_the_run(source, tmp_path):
    make = CountingText if source == "indexed" else SOURCES[source]
    args = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    runs = []
    for name in ("alone", "seen"):
        trainer = hosted([Watch()], tmp_path / name, make(), **args)
        if name == "seen":
            looks = Looks()
            looks.trainer = trainer
            trainer.add_callback(looks)
        trainer.train()
        runs.append(trainer)
    assert looks.shapes == [8] * 6
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert largest_difference(weights_of(runs[0]), weights_of(runs[1])) == 0.0
    resumed = hosted([Watch()], tmp_path / "resumed", make(), **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "seen" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(runs[0])


@pytest.mark.parametrize("source", [Text, CountingText])
def test_the_loader_has_the_attributes_of_trainers(source, tmp_path):
    theirs = hosted([], tmp_path, source(20), Trainer).get_train_dataloader()
    loader = hosted([Watch()], tmp_path, source(20)).get_train_dataloader()
    for name in ("dataset", "batch_size", "total_batch_size", "sampler", "batch_sampler", "collate_fn", "drop_last"):
        assert hasattr(loader, name), name
    assert loader.total_batch_size == 8 and loader.num_workers == theirs.num_workers == 0
    loader.set_epoch(0)
    theirs.set_epoch(0)
    if source is CountingText:
        assert len(loader) == len(theirs) == 3 and loader.total_dataset_length == theirs.total_dataset_length == 20
        assert sorted(loader.sampler) == list(range(20))
        assert [len(ids) for ids in loader.batch_sampler] == [8, 8, 4]
    batches = list(zip(loader, theirs, strict=True))
    assert [len(batch["labels"]) for batch, _ in batches] == [8, 8, 4]
    for batch, other in batches:
        assert torch.equal(batch["input_ids"], other["input_ids"])


def test_a_look_does_not_change_the_count_of_samples(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.get_train_dataloader()

    trainer = tiny_trainer([Budget("40samples")], tmp_path)
    trainer.train_dataset = CountingText(20)
    trainer.add_callback(Asks())
    trainer.train()
    assert (trainer.receipt.samples, trainer.state.global_step) == (40, 6)
