from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_accel import TokenCutoff
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.data.regularization.token_cutoff import draw_cuts
from hf_accel.testing import CountingText, collate_padded, tiny_llama, tiny_trainer

ROWS = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [31, 32], [41, 42, 43, 44, 45]]


def padded(side="right"):
    width = max(map(len, ROWS))
    fill = [[0] * (width - len(row)) for row in ROWS]
    rows = [(r + f) if side == "right" else (f + r) for r, f in zip(ROWS, fill, strict=True)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clone()}


def started(progress=1.0, **fields):
    technique = TokenCutoff(**fields)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=progress))
    technique.on_train_begin(None, None, None, model=tiny_llama())
    return technique


def cut(technique, inputs):
    plan = StepPlan(0, torch.arange(3), None, 3)
    batch = StepBatch(plan, [MicroBatch(inputs, torch.arange(3), None)])
    return technique.transform_batch(batch).micro_batches[0].inputs


def kept(inputs):
    return [row[row != 0].tolist() for row in inputs["input_ids"]]


def test_so_many_inner_tokens_are_cut_uniformly():
    examples, seen = torch.arange(3)[:, None].expand(3, 11), padded()["attention_mask"].bool()
    counts = torch.zeros(3, 11)
    for trial in range(2000):
        drawn = [np.random.default_rng((trial, i)) for i in range(3)]
        cuts = draw_cuts(examples, seen, 0.5, drawn)
        assert cuts.sum(1).tolist() == [round(0.5 * 9), 0, round(0.5 * 3)]
        counts += cuts
    assert counts[0, [0, 10]].sum() == 0 and counts[2, [0, 4]].sum() == 0 and counts[1].sum() == 0
    share = 4 / 9
    assert (counts[0, 1:10] / 2000 - share).abs().max() < 4 * (share * (1 - share) / 2000) ** 0.5


def test_padding_side_and_flattening_do_not_matter():
    right, left = (cut(started(share=0.4), padded(side)) for side in ("right", "left"))
    flat = {
        "input_ids": torch.tensor([[t for row in ROWS for t in row]]),
        "position_ids": torch.tensor([[i for row in ROWS for i in range(len(row))]]),
    }
    flattened = cut(started(share=0.4), flat)["input_ids"][0].split([11, 2, 5])
    assert kept(right) == kept(left) == [row[row != 0].tolist() for row in flattened]
    assert [len(row) for row in kept(right)] == [11 - round(0.4 * 9), 2, 5 - round(0.4 * 3)]
    assert torch.equal(right["attention_mask"], (right["input_ids"] != 0).long())
    assert torch.equal(right["labels"], padded()["labels"])


def test_a_cut_token_is_unseen_by_the_others():
    """The answer of a classifier with a cut token does not depend on that token, and does on the others."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**sizes, initializer_range=0.5)).eval()
    technique = started(share=0.4)
    inputs = padded()
    inputs.pop("labels")
    found = cut(technique, inputs)
    holes = (found["input_ids"] == 0) & (inputs["input_ids"] != 0)
    other = {**inputs, "input_ids": inputs["input_ids"].where(~holes, 49)}
    hidden = {**found, "input_ids": other["input_ids"]}
    with torch.no_grad():
        assert torch.allclose(model(**found).logits, model(**hidden).logits, atol=1e-5)
        assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-3)


def test_rows_without_a_mask_get_one():
    masked, bare = padded(), padded()
    del bare["attention_mask"]
    bare["input_ids"] = masked["input_ids"] = torch.arange(5, 38).view(3, 11)
    masked["attention_mask"] = torch.ones_like(bare["input_ids"])
    found, expected = cut(started(share=0.4), bare), cut(started(share=0.4), masked)
    assert torch.equal(found["attention_mask"], expected["attention_mask"]) and (found["attention_mask"] == 0).any()


def test_the_share_rises_and_is_reported():
    technique = started(progress=0.0, share=0.4, ramp=0.5)
    assert kept(cut(technique, padded())) == ROWS
    technique.run_.clock.progress = 0.25
    assert [len(row) for row in kept(cut(technique, padded()))] == [11 - round(0.2 * 9), 2, 5 - round(0.2 * 3)]
    assert technique.report() == {"cut": (2 + 1) / 36} and technique.took_effect(technique.report())


def test_what_cannot_be_cut_is_refused(tmp_path):
    model = tiny_llama()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="needs a padding token to cut with. Set config.pad_token_id"):
        tiny_trainer([TokenCutoff()], tmp_path, model=model).train()
    with pytest.raises(ValueError, match=r"TokenCutoff\(.*reads pixel_values, not input_ids"):
        tiny_trainer([TokenCutoff()], tmp_path, modality="image").train()
    inputs = collate_padded([CountingText()[i] for i in range(3)])
    inputs["attention_mask"] = torch.ones(3, 1, 4, 4)
    with pytest.raises(ValueError, match="does not mark the tokens of input_ids"):
        cut(started(), inputs)


@pytest.mark.parametrize("masked", [True, False])
def test_each_choice_keeps_its_first_and_last_token(masked):
    choices = torch.arange(5, 5 + 3 * 2 * 11).view(3, 2, 11)
    inputs = {"input_ids": choices, "labels": torch.tensor([0, 1, 1])}
    if masked:
        inputs["attention_mask"] = torch.ones_like(choices)
        inputs["attention_mask"][2, 1, 6:] = 0
    found = cut(started(share=0.4), inputs)
    holes = found["input_ids"] == 0
    last = 4 if masked else 9
    assert holes.sum(-1).tolist() == [[4, 4], [4, 4], [4, round(0.4 * last)]]
    assert not holes[..., 0].any() and not holes[:2, :, 10].any() and not holes[2, 1, 5 if masked else 10]
    assert torch.equal(found["attention_mask"] == 0, holes | (inputs["attention_mask"] == 0 if masked else False))
    assert not torch.equal(holes[0, 0], holes[0, 1])
    assert found["labels"].tolist() == [0, 1, 1]


def test_rows_that_are_no_examples_are_refused():
    pairs = {"input_ids": torch.arange(5, 71).view(6, 11), "completion_mask": torch.ones(6, 11)}
    with pytest.raises(ValueError, match=r"TokenCutoff\(.*does not support 6 rows for 3 examples without position_ids"):
        cut(started(), pairs)
