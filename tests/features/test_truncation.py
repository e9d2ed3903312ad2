import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_accel import SequenceLengthWarmup
from hf_accel.batch import MicroBatch
from hf_accel.features.truncation import check_cuttable, rechunk, truncate
from hf_accel.losses import examples_of

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


def pieces(row, length):
    return [row[i : i + length] for i in range(0, len(row), length)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9])
def test_pieces_are_all_of_every_example(side, length):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cut = rechunk(MicroBatch(padded(side), torch.tensor([7, 3, 5, 9]), weights), length)
    expected = [(i, piece) for i, row in zip((7, 3, 5, 9), ROWS, strict=True) for piece in pieces(row, length)]
    assert tokens(cut.inputs) == [piece for _, piece in expected]
    assert cut.ids_B.tolist() == [i for i, _ in expected]
    assert cut.weights_B.tolist() == [{7: 1, 3: 2, 5: 3, 9: 4}[i] for i in cut.ids_B.tolist()]
    assert torch.equal(cut.inputs["labels"] == -100, cut.inputs["attention_mask"] == 0)
    assert cut.inputs["kind"].tolist() == [[7, 3, 5, 9].index(i) for i, _ in expected]
    assert cut.inputs["embedding"].shape == (*cut.inputs["input_ids"].shape, 3)


def test_pieces_without_labels_are_left_out():
    inputs = padded()
    inputs["labels"][:, :4] = -100
    cut = rechunk(MicroBatch(inputs, torch.arange(4), None), 4)
    assert tokens(cut.inputs) == [ROWS[0][4:], ROWS[2][4:]] and cut.ids_B.tolist() == [0, 2]
    inputs["labels"][:] = -100
    assert tokens(rechunk(MicroBatch(inputs, torch.arange(4), None), 4).inputs) == [ROWS[0][:4]]


def test_packed_examples_begin_anew_with_every_piece():
    packed = {
        "input_ids": torch.tensor([[11, 12, 13, 21, 22, 23, 24], [31, 32, 33, 34, 35, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 12, 13, -100, 22, 23, 24], [-100, 32, 33, 34, 35, -100, -100]]),
    }
    cut = rechunk(MicroBatch(packed, torch.tensor([4, 5, 6]), None), 2)
    assert cut.inputs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 2]]
    assert cut.inputs["labels"].tolist() == [[-100, 12, -100, -100, 22, -100, 24], [-100, 32, -100, 34] + [-100] * 3]
    assert cut.ids_B.tolist() == [4, 4, 5, 5, 6, 6, 6]
    assert examples_of(cut.inputs, len(cut.ids_B))[0].tolist() == [0, 0, 1, 2, 2, 3, 3]


def flattened(**more):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, **more)
    return collate([{"input_ids": row, "labels": row} for row in ROWS])


@pytest.mark.parametrize("first", [0, 2])
def test_borders_of_flattened_examples_follow_the_cut(first):
    inputs = flattened(position_ids_start=first)
    check_cuttable(inputs, SequenceLengthWarmup())
    shorter = truncate(inputs, 3)
    assert shorter["input_ids"].tolist() == [[t for row in ROWS for t in row[:3]]]
    for side in "qk":
        assert shorter[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 8, 11]
        assert shorter[f"cu_seq_lens_{side}"].dtype == inputs[f"cu_seq_lens_{side}"].dtype
        assert shorter[f"max_length_{side}"] == 3 and type(shorter[f"max_length_{side}"]) is int
    assert shorter["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]]
    assert shorter["position_ids"].tolist() == [[first + i for row in ROWS for i in range(len(row[:3]))]]

    cut = rechunk(MicroBatch(inputs, torch.arange(4), None), 3).inputs
    assert cut["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10, 13, 15, 18, 19] and cut["max_length_k"] == 3
    assert cut["seq_idx"].max() == 7
    assert cut["position_ids"].tolist() == [[first + i % 3 for row in ROWS for i in range(len(row))]]


def test_the_borders_of_a_single_example_follow_the_cut():
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    shorter = truncate(collate([{"input_ids": ROWS[2], "labels": ROWS[2]}]), 3)
    assert shorter["cu_seq_lens_q"].tolist() == [0, 3] and shorter["max_length_q"] == 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_choices_are_cut_one_by_one(side):
    rows = {name: value[:, None] for name, value in padded(side).items() if name != "kind"}
    inputs = {name: torch.cat([value[:2], value[2:]], 1) for name, value in rows.items()}  # two choices each
    inputs["labels"] = torch.tensor([1, 0])
    shorter = truncate(inputs, 3)
    assert shorter["input_ids"].shape == (2, 2, 3) and shorter["embedding"].shape == (2, 2, 3, 3)
    flat = {name: shorter[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    assert tokens(flat) == [row[:3] for row in (ROWS[0], ROWS[2], ROWS[1], ROWS[3])]
    assert shorter["labels"].tolist() == [1, 0]


def test_labels_of_as_many_classes_as_positions_stay_whole():
    inputs = padded() | {"labels": torch.rand(4, 8)}
    assert torch.equal(truncate(inputs, 3)["labels"], inputs["labels"])


def test_pieces_of_encoders_keep_their_first_label():
    flat = {name: value for name, value in flattened().items() if name in ("input_ids", "labels", "position_ids")}
    cut = rechunk(MicroBatch(flat, torch.arange(4), None), 3, shift=False)
    assert torch.equal(cut.inputs["labels"], flat["labels"])


@pytest.mark.parametrize(
    ("more", "gone", "said"),
    [
        ({"perm_mask": torch.zeros(4, 8, 8)}, None, "perm_mask"),
        ({"target_mapping": torch.zeros(4, 8, 8)}, None, "target_mapping"),
        ({"attention_mask": torch.ones(4, 1, 8, 8)}, None, "attention_mask"),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, None, "pixel_values"),
        ({"position_ids": torch.zeros(3, 4, 8)}, None, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 8, 16, 24, 32])}, None, "cu_seq_lens_q"),
        ({"ref_chosen_logps": torch.zeros(2)}, None, "ref_chosen_logps"),
        ({"start_positions": torch.zeros(4)}, "labels", "start_positions"),
        ({"completion_mask": torch.ones(4, 8)}, "labels", "completion_mask"),
        ({"chosen_input_ids": torch.ones(4, 8)}, "input_ids", "chosen_input_ids"),
    ],
)
def test_what_a_cut_would_leave_behind_is_refused(more, gone, said):
    inputs = padded() | more
    inputs.pop(gone, None)
    with pytest.raises(ValueError, match=rf"SequenceLengthWarmup\(.*\) does not support .*{said}"):
        check_cuttable(inputs, SequenceLengthWarmup())
