"""Examples are read again as the data set gives them, in every process."""

import pytest
import torch
from transformers import BatchEncoding

from hf_accel.batch import StepPlan
from hf_accel.stream.indexed import StepStream
from hf_accel.stream.iterable import IterableStepStream
from hf_accel.stream.reader import StepReader

ROWS = {"x": [1, 2], "nested": [[3], [4, 5]], "y": 6}


def spoiling(features):  # huggingface/transformers#27333
    for feature in features:
        feature["x"].append(7)
        feature["nested"][0].append(8)
    return {"y": torch.tensor([f.pop("y") for f in features]), "x": torch.tensor([f["x"] for f in features])}


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_collator_may_change_its_examples(kind):
    data = [kind({"x": [1, 2], "nested": [[3], [4, 5]], "y": 6})]
    reader, plan = StepReader(data, spoiling), StepPlan(0, torch.tensor([0]), None, 1)
    for _ in range(2):
        (micro,) = reader[plan].micro_batches
        assert micro.inputs["x"].tolist() == [[1, 2, 7]] and micro.inputs["y"].tolist() == [6]
    assert dict(data[0]) == ROWS


def test_a_collator_may_change_the_examples_of_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"x": [1, 2], "nested": [[3], [4, 5]], "y": 6}

    stream = IterableStepStream(Stream(), spoiling, batch_size=1, micro_batch_size=1, seed=0)
    stream.set_epoch(0)
    for batch in stream:
        again = stream.read(batch.plan)
        assert again.micro_batches[0].inputs["x"].tolist() == [[1, 2, 7]]


class Epochs(torch.utils.data.Dataset):
    """Examples that hold the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.epoch


def test_an_epoch_reaches_workers_that_persist():  # huggingface/datasets#6673, starVLA/starVLA#470
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    stream = StepStream(Epochs(), torch.tensor, batch_size=2, micro_batch_size=2, seed=0, loader=workers)
    for epoch in (0, 1, 2):
        stream.set_epoch(epoch)
        assert [micro.inputs.tolist() for batch in stream for micro in batch.micro_batches] == [[epoch] * 2] * 2
