from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_accel import AccelTrainer, LengthGrouped, RandomSubset, TokensPerBatch
from hf_accel.data.batching.tokens_per_batch import nearest_count
from hf_accel.testing import CountingText, collate_padded, losses_of, tiny_llama, tiny_trainer


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 200))
def test_the_sum_is_the_nearest(lengths, tokens):
    count = nearest_count(torch.tensor(lengths), tokens)
    distances = [abs(sum(lengths[:k]) - tokens) for k in range(1, len(lengths) + 1)]
    assert distances[count - 1] == min(distances) and distances.index(min(distances)) == count - 1


class Count(TrainerCallback):
    """Counts the real tokens of each step, by epoch, at the model's door."""

    def __init__(self, model):
        self.epochs, self.tokens = [], []
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, inputs):
        self.tokens.append(int(inputs["attention_mask"].sum()))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append([])

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs[-1].append(sum(self.tokens))
        self.tokens.clear()


def tokens_of_steps(trainer):
    trainer.add_callback(counter := Count(trainer.model))
    trainer.train()
    return counter.epochs


@pytest.mark.parametrize("others", [[], [RandomSubset(), LengthGrouped()]], ids=["alone", "chosen and ordered"])
def test_every_step_has_nearly_the_same_tokens(others, tmp_path):
    technique = TokensPerBatch(tokens=100)
    trainer = tiny_trainer([*others, technique], tmp_path, micro_batch_size=5)
    epochs = tokens_of_steps(trainer)
    whole = [tokens for epoch in epochs for tokens in epoch[:-1]]
    assert len(epochs) == 3 and len(whole) > 3
    assert all(abs(tokens - 100) <= 12 for tokens in whole)  # half of the longest example
    assert technique.report()["tokens_per_step"] == pytest.approx(sum(whole) / len(whole))
    assert technique.report()["furthest"] == max(abs(tokens - 100) for tokens in whole)
    if not others:
        assert [sum(epoch) for epoch in epochs] == [sum(map(len, CountingText().rows))] * 3


def test_the_default_is_what_the_batch_size_has_on_average(tmp_path):
    trainer = tiny_trainer([technique := TokensPerBatch()], tmp_path, max_steps=1)
    trainer.train()
    lengths = list(map(len, CountingText().rows))
    assert technique.tokens_ == round(8 * sum(lengths) / len(lengths))


class Text(IterableDataset):
    def __iter__(self):
        return iter(CountingText()[i] for i in range(40))


def test_a_stream_is_read_as_far_as_needed(tmp_path):
    args = tiny_trainer([], tmp_path, max_steps=5).args
    runs = []
    for source in (Text(), datasets.Dataset.from_list(list(Text())), Text()):
        args.train_sampling_strategy = "sequential"
        technique = TokensPerBatch(tokens=250)  # more than the batch size has
        trainer = AccelTrainer(
            tiny_llama(), args, train_dataset=source, data_collator=collate_padded, techniques=[technique]
        )
        runs.append((tokens_of_steps(trainer), losses_of(trainer), technique.report()))
    assert runs[0] == runs[1] == runs[2]
    assert all(abs(tokens - 250) <= 12 for epoch in runs[0][0] for tokens in epoch[:-1])


def test_a_budget_that_an_example_exceeds_is_refused():
    technique = TokensPerBatch(tokens=5)
    technique.run_ = SimpleNamespace(args=SimpleNamespace(length_column_name="length"))
    with pytest.raises(
        ValueError, match=r"TokensPerBatch\(tokens=5\) does not support an example of 9 tokens\. Set tokens=9"
    ):
        technique.inspect_dataset([{"length": n} for n in (3, 9)])
    technique = TokensPerBatch()
    technique.run_ = SimpleNamespace(args=SimpleNamespace(length_column_name="length"))
    with pytest.raises(ValueError, match=r"TokensPerBatch\(tokens=None\) does not support Text .* Set tokens="):
        technique.inspect_dataset(Text())


def test_padding_in_the_data_set_is_no_token_and_seconds_are_none():
    technique = TokensPerBatch(tokens=9)
    technique.run_ = SimpleNamespace(args=SimpleNamespace(length_column_name="length"))
    technique.inspect_dataset([{"input_ids": [1] * 9, "attention_mask": [1] * n + [0] * (9 - n)} for n in (3, 4, 2)])
    assert technique.batch(torch.arange(3), 1) == 3
    with pytest.raises(ValueError, match=r"TokensPerBatch\(.*'length'.*length_column_name"):
        technique.inspect_dataset([{"length": 0.5}, {"length": 2.25}])
