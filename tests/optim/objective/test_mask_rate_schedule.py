from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from hf_accel import MaskRateSchedule
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.optim.objective.mask_rate_schedule import draw_masks
from hf_accel.testing import VOCABULARY, collate_masked, tiny_bert, tiny_llama, tiny_tokenizer, tiny_trainer

ROWS = [list(range(3, 40)), list(range(20, 32)), [41, 1, 2, 42, 43, 44]]  # 1 and 2 are special


def padded(side="right"):
    width = max(map(len, ROWS))
    fill = [[0] * (width - len(row)) for row in ROWS]
    rows = [(r + f) if side == "right" else (f + r) for r, f in zip(ROWS, fill, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[int(t != 0) for t in r] for r in rows])}


def started(progress=0.0, collator=None, **fields):
    technique = MaskRateSchedule(**fields)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=progress), data_collator=collator)
    technique.on_train_begin(None, None, None, model=tiny_bert(), processing_class=tiny_tokenizer())
    return technique


def masked(technique, inputs, epoch=0, ids=(0, 1, 2)):
    ids = torch.tensor(ids)
    batch = StepBatch(StepPlan(epoch, ids, None, len(ids), seed=5), [MicroBatch(inputs, ids, None)])
    return technique.transform_batch(batch).micro_batches[0].inputs


def of_tokens(inputs):
    """Inputs and labels of each row without padding."""
    real = inputs["attention_mask"].bool()
    return [(i[m].tolist(), t[m].tolist()) for i, t, m in zip(inputs["input_ids"], inputs["labels"], real, strict=True)]


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_so_many_are_masked_in_the_ratios_of_bert(rate):
    n = 200_000
    ids = torch.randint(3, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(0))
    maskable = torch.arange(n)[None] % 4 != 0
    example = torch.zeros_like(ids)
    found, labels = draw_masks(ids, maskable, example, rate, [np.random.default_rng(0)], 1, VOCABULARY)
    drawn = labels != -100
    assert torch.equal(labels[drawn], ids[drawn]) and torch.equal(found[~drawn], ids[~drawn])
    assert not drawn[~maskable].any()

    def close(count, share, of):
        assert abs(count - share * of) < 4 * (share * (1 - share) * of) ** 0.5

    total = int(drawn.sum())
    close(total, rate, int(maskable.sum()))
    close(int((found[drawn] == 1).sum()), 0.8 + 0.1 / VOCABULARY, total)
    close(int((found[drawn] == ids[drawn]).sum()), 0.1 + 0.1 / VOCABULARY, total)
    others = found[drawn & (found != 1) & (found != ids)]
    close(len(others), 0.1 * (VOCABULARY - 2) / VOCABULARY, total)
    assert set(others.tolist()) == set(range(VOCABULARY)) - {1}


def test_the_rate_is_linear_in_progress():
    counts = []
    for progress in (0.0, 0.5, 1.0):
        technique = started(progress, start=0.6, end=0.2)
        for epoch in range(200):
            masked(technique, padded(), epoch)
        share, n = technique.report()["masked"], 200 * (37 + 12 + 4)
        rate = 0.6 - 0.4 * progress
        assert abs(share - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
        counts.append(share)
    assert counts == sorted(counts, reverse=True) and technique.took_effect(technique.report())


def test_special_tokens_and_padding_are_never_masked():
    technique = started(start=0.99, end=0.99)
    for epoch in range(20):
        found = masked(technique, padded(), epoch)
        special = torch.isin(padded()["input_ids"], torch.tensor([0, 1, 2]))
        assert (found["labels"][special] == -100).all()
        assert torch.equal(found["input_ids"][special], padded()["input_ids"][special])
        assert int((found["labels"] != -100).sum()) > 40


def test_padding_and_company_do_not_matter():
    together = of_tokens(masked(started(), padded()))
    assert of_tokens(masked(started(), padded("left"))) == together
    alone = {name: value[1:2, :12] for name, value in padded().items()}
    assert of_tokens(masked(started(), alone, ids=(1,))) == together[1:2]
    flat = {
        "input_ids": torch.tensor([[t for row in ROWS for t in row]]),
        "position_ids": torch.tensor([[i for row in ROWS for i in range(len(row))]]),
    }
    found = masked(started(), flat)
    assert found["input_ids"][0].tolist() == [t for inputs, _ in together for t in inputs]
    assert of_tokens(masked(started(), padded(), epoch=1)) != together


def test_the_collators_masks_are_undone():
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.5, seed=3)
    given = collator([{"input_ids": row} for row in ROWS])
    assert (given["labels"] != -100).any()
    assert of_tokens(masked(started(collator=collator), dict(given))) == of_tokens(masked(started(), padded()))


def test_evaluation_keeps_the_collators_masks(tmp_path):
    technique = MaskRateSchedule(0.9, 0.9)
    trainer = tiny_trainer([technique], tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["labels"]), with_kwargs=True)
    trainer.train()
    rows = [trainer.eval_dataset[i] for i in range(16)]
    assert torch.equal(seen[-1], collate_masked(rows)["labels"])
    shares = [float((labels != -100).sum() / labels.numel()) for labels in seen]
    assert min(shares[:-1]) > 2 * shares[-1]


@pytest.mark.parametrize(
    ("settings", "change", "sentence"),
    [
        ({"model": tiny_llama()}, {}, "does not support LlamaForCausalLM because it is no masked language model"),
        ({}, {"processing_class": None}, "needs a mask token. Pass a tokenizer that has one as processing_class="),
    ],
)
def test_what_cannot_be_masked_is_refused(settings, change, sentence, tmp_path):
    trainer = tiny_trainer([MaskRateSchedule()], tmp_path, modality="masked text", **settings)
    for name, value in change.items():
        setattr(trainer, name, value)
        setattr(trainer.callback_handler, name, value)
    with pytest.raises(ValueError, match=f"MaskRateSchedule.*{sentence}"):
        trainer.train()


def test_masks_of_whole_words_are_not_undone():
    with pytest.raises(ValueError, match="the collator masks whole words"):
        started(collator=SimpleNamespace(whole_word_mask=True))
