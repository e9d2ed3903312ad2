from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_accel.data.curriculum.sequence_length_warmup import SequenceLengthWarmup, truncate, warmed_up_length
from hf_accel.stream import MicroBatch, StepBatch, StepPlan

ROWS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37, 38], [41, 42, 43, 44]]


def padded(side="right", rows=ROWS):
    width = max(map(len, rows))

    def fill(row, value):
        rest = [value] * (width - len(row))
        return row + rest if side == "right" else rest + row

    return {
        "input_ids": torch.tensor([fill(row, 0) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([fill(row, -100) for row in rows]),
        "kind": torch.arange(len(rows)),
        "embedding": torch.tensor([fill(row, 0) for row in rows]).float()[..., None].expand(-1, -1, 3),
    }


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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [1 + i for i in range(9)])
def test_the_beginnings_of_examples_are_kept(side, length):
    inputs = padded(side)
    shorter = truncate(inputs, length)
    if length == 1:  # no label to predict would be left
        assert tokens(shorter) == ROWS
        return
    assert tokens(shorter) == [row[:length] for row in ROWS]
    assert torch.equal(shorter["labels"] == -100, shorter["attention_mask"] == 0)
    assert torch.equal(shorter["embedding"][..., 2], shorter["input_ids"].float())
    assert shorter["kind"].tolist() == [0, 1, 2, 3]
    one_by_one = [tokens(truncate(padded(side, [row]), length))[0] for row in ROWS]
    assert one_by_one == tokens(shorter)


def test_flattened_examples_are_cut_one_by_one():
    flat = {
        "input_ids": torch.tensor([[t for row in ROWS for t in row]]),
        "position_ids": torch.tensor([[i for row in ROWS for i in range(len(row))]]),
        "labels": torch.tensor([[-100 if i == 0 else t for row in ROWS for i, t in enumerate(row)]]),
    }
    shorter = truncate(flat, 3)
    assert shorter["input_ids"].tolist() == [[t for row in ROWS for t in row[:3]]]
    assert shorter["position_ids"].tolist() == [[i for row in ROWS for i in range(len(row[:3]))]]
    assert shorter["labels"].shape == shorter["input_ids"].shape


def test_packed_examples_are_cut_one_by_one_and_stay_in_one_piece():
    packed = {
        "input_ids": torch.tensor([[11, 12, 13, 21, 22, 23, 24], [31, 32, 33, 34, 35, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),  # 12 is hidden
        "labels": torch.tensor([[-100, 12, 13, -100, 22, 23, 24], [-100, 32, 33, 34, 35, -100, -100]]),
    }
    assert {name: value.tolist() for name, value in truncate(packed, 2).items()} == {
        "input_ids": [[11, 12, 21, 22], [31, 32, 0, 0]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 2, 3]],
        "attention_mask": [[1, 0, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, 12, -100, 22], [-100, 32, -100, -100]],
    }


def test_left_padding_with_positions_is_not_packed():
    inputs = padded("left") | {"position_ids": padded("left")["attention_mask"].cumsum(1).sub(1).clamp(min=1)}
    assert tokens(truncate(inputs, 3)) == [row[:3] for row in ROWS]


def test_labels_at_the_end_are_not_lost():
    inputs = padded()
    inputs["labels"][:, :6] = -100
    assert tokens(truncate(inputs, 4)) == ROWS


def test_the_technique_asks_the_clock_and_counts():
    technique = SequenceLengthWarmup(start=0.25, end=0.5, multiple=2)
    technique.host_ = SimpleNamespace(clock=SimpleNamespace(progress=0.0))
    technique.inspect_dataset([{"input_ids": row} for row in ROWS])
    technique.on_train_begin(None, None, None, model=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False)))
    plan = StepPlan(0, torch.arange(4), None, 4)
    batch = StepBatch(plan, [MicroBatch(padded(), torch.arange(4), None)])
    for progress, length in ((0.0, 2), (0.1, 4), (0.4, 8), (0.5, 8)):
        technique.host_.clock.progress = progress
        out = technique.transform_batch(batch)
        assert tokens(out.micro_batches[0].inputs) == [row[:length] for row in ROWS]
    assert technique.report() == {"positions": (2 + 4 + 8 + 8) / 32} and technique.took_effect(technique.report())
    other = SequenceLengthWarmup()
    other.load_state_dict("rank", technique.state_dict("rank"))
    assert other.report() == technique.report()
