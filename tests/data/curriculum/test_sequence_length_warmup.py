from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForQuestionAnswering

from hf_accel import AccelTrainer, Packing, TokenCutoff
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.data.curriculum.sequence_length_warmup import SequenceLengthWarmup, warmed_up_length
from hf_accel.testing import CountingText, collate_padded, tiny_bert, tiny_llama, tiny_trainer

ROWS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37, 38], [41, 42, 43, 44]]


def padded():
    return collate_padded([{"input_ids": row, "labels": row} for row in ROWS])


def tokens(inputs):
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize(("full", "start", "multiple"), [(100, 0.25, 8), (128, 0.1, 1), (5, 0.5, 8), (77, 1.0, 8)])
def test_lengths_follow_the_equation(full, start, multiple):
    lengths = [warmed_up_length(i / 100, full, start=start, end=0.4, multiple=multiple) for i in range(101)]
    assert lengths == sorted(lengths) and set(lengths[40:]) == {full}
    for i, length in enumerate(lengths[:40]):
        exact = full * (Fraction(start) + (1 - Fraction(start)) * Fraction(i, 40))
        assert length == full or (length % multiple == 0 and exact - Fraction(1, 10**9) <= length < exact + multiple)
        assert start < 1 or length == full


def test_the_technique_asks_the_clock_and_counts():
    technique = SequenceLengthWarmup(start=0.25, end=0.5, multiple=2)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=0.0))
    technique.inspect_dataset([{"input_ids": row} for row in ROWS])
    technique.on_train_begin(None, None, None, model=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False)))
    plan = StepPlan(0, torch.arange(4), None, 4)
    batch = StepBatch(plan, [MicroBatch(padded(), torch.arange(4), None)])
    for progress, length in ((0.0, 2), (0.1, 4), (0.4, 8), (0.5, 8)):
        technique.run_.clock.progress = progress
        out = technique.transform_batch(batch)
        assert tokens(out.micro_batches[0].inputs) == [row[:length] for row in ROWS]
    assert technique.report() == {"positions": (2 + 4 + 8 + 8) / 32, "pieces": 1.0} and technique.took_effect(
        technique.report()
    )
    other = SequenceLengthWarmup()
    other.load_state_dict("rank", technique.state_dict("rank"))
    assert other.report() == technique.report()


@pytest.mark.parametrize("start", [0.25, 1.0])
def test_what_lies_beyond_the_full_length_is_cut_to_the_end(start):
    technique = SequenceLengthWarmup(start=start, end=0.5, multiple=2, max_length=4)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=1.0))
    technique.inspect_dataset([{"input_ids": row} for row in ROWS])
    technique.on_train_begin(None, None, None, model=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False)))
    batch = StepBatch(StepPlan(0, torch.arange(4), None, 4), [MicroBatch(padded(), torch.arange(4), None)])
    assert tokens(technique.transform_batch(batch).micro_batches[0].inputs) == [row[:4] for row in ROWS]


def test_pieces_keep_the_tokens_of_a_step(tmp_path):
    trainer = tiny_trainer([SequenceLengthWarmup(cut="rechunk", end=1.0)], tmp_path, num_train_epochs=1)
    trainer.train()
    report = trainer.receipt.techniques[0]["report"]
    assert report["pieces"] > 1.2
    whole = sum(len(row) for row in trainer.train_dataset.rows)
    # A last piece of one token teaches nothing to a causal model, and a piece of padding is not there.
    assert whole == trainer.receipt.tokens


def test_pieces_of_what_has_one_label_are_refused():
    technique = SequenceLengthWarmup(cut="rechunk")
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=0.0))
    technique.full_length_ = 8
    batch = StepBatch(
        StepPlan(0, torch.arange(4), None, 4),
        [MicroBatch(padded() | {"labels": torch.arange(4)}, torch.arange(4), None)],
    )
    with pytest.raises(ValueError, match="does not support labels of whole examples. Set cut='truncate'"):
        technique.transform_batch(batch)


def test_answers_are_not_cut_off(tmp_path):
    def collate(features):
        batch = collate_padded([feature | {"labels": feature["input_ids"]} for feature in features])
        del batch["labels"]
        ends = batch["attention_mask"].sum(1) - 1
        return batch | {"start_positions": ends - 1, "end_positions": ends}

    trainer = AccelTrainer(
        tiny_bert(kind=BertForQuestionAnswering),
        tiny_trainer([], tmp_path).args,
        train_dataset=CountingText(),
        data_collator=collate,
        techniques=[SequenceLengthWarmup()],
    )
    with pytest.raises(ValueError, match=r"SequenceLengthWarmup\(.*does not support .*start_positions"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("technique", [SequenceLengthWarmup(), TokenCutoff(), Packing()], ids=repr)
def test_tokens_that_stand_for_images_are_not_cut(technique, tmp_path):
    model = tiny_llama()
    model.config.image_token_id = 5
    with pytest.raises(ValueError, match=rf"{type(technique).__name__}\(.*does not support .*image_token_id"):
        tiny_trainer([technique], tmp_path, model=model).train()


class Sums(torch.nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(48, 4), torch.nn.Linear(4, 48)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_any_module_trains_on_beginnings(tmp_path):
    trainer = tiny_trainer([SequenceLengthWarmup(end=1.0)], tmp_path, model=Sums())
    trainer.train()
    assert 0 < trainer.receipt.techniques[0]["report"]["positions"] < 1


def test_padding_in_the_data_set_does_not_lengthen_the_warmup():
    technique = SequenceLengthWarmup()
    rows = [
        {"input_ids": row + [0] * (16 - len(row)), "attention_mask": [1] * len(row) + [0] * (16 - len(row))}
        for row in ROWS
    ]
    technique.inspect_dataset(rows)
    assert technique.full_length_ == 8
