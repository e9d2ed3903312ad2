"""A stream of examples on two ranks: each reads the whole and trains on its share."""

import datasets
import pytest
import torch
from ranks import assert_backend, backend_args, run_on_ranks

from hf_accel import AccelTrainer, Packing, SelectiveBackprop, SequenceLengthWarmup, TokensPerBatch
from hf_accel.testing import CountingText, collate_padded, largest_difference, losses_of, tiny_llama, tiny_trainer
from hf_accel.weights import gather, local_parameters

pytestmark = [pytest.mark.distributed, pytest.mark.ci]


def text():
    table = datasets.Dataset.from_list([CountingText()[i] for i in range(40)])
    return table.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=16)


def train(directory, backend=None, resume=None, **args):
    args |= {"max_steps": 8} | ({"per_device_train_batch_size": 8} if backend is None else backend_args(backend))
    if backend is not None:
        args["per_device_train_batch_size"] = 4
    techniques = [SequenceLengthWarmup(max_length=24), SelectiveBackprop(), Packing(max_length=24), TokensPerBatch(90)]
    trainer = AccelTrainer(
        tiny_llama(0.0, torch.float64),
        tiny_trainer([], directory, **args).args,
        train_dataset=text(),
        data_collator=collate_padded,
        techniques=techniques,
    )
    trainer.train(resume_from_checkpoint=resume)
    if backend is not None:
        assert_backend(trainer, backend)
    local = {name: value.clone() for name, value in local_parameters(trainer.model, trainable_only=False).items()}
    reports = [entry["report"] for entry in trainer.receipt.techniques]
    return {
        "weights": gather(trainer.model, local),  # on the first rank
        "local": local,
        "losses": losses_of(trainer),
        "books": (trainer.receipt.samples, trainer.receipt.tokens, trainer.state.epoch, reports[1], reports[3]),
    }


def test_two_ranks_equal_one_and_resume(tmp_path):
    def straight_and_resumed():
        straight = train(tmp_path / "straight", "ddp", save_strategy="steps", save_steps=5)
        return straight, train(tmp_path / "resumed", "ddp", str(tmp_path / "straight" / "checkpoint-5"))

    one = train(tmp_path / "one")
    ranks = run_on_ranks(straight_and_resumed, timeout=240)
    assert largest_difference(ranks[0][0]["weights"], one["weights"]) < 1e-9
    for straight, resumed in ranks:
        assert straight["books"] == one["books"]
        assert largest_difference(straight["local"], ranks[0][0]["local"]) == 0.0
        assert largest_difference(resumed["local"], straight["local"]) == 0.0
        assert (resumed["losses"], resumed["books"]) == (straight["losses"], straight["books"])
