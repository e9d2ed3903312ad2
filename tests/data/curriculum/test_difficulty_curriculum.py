import copy
import math
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from hf_accel import DifficultyCurriculum
from hf_accel.data.curriculum.difficulty_curriculum import competence, difficulties, lay_out
from hf_accel.testing import tiny_trainer

ROWS = [[5, 6, 7], [5], [5, 5, 5, 5, 5, 5], [8, 9]]


def test_competence_is_the_papers():
    progress = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = competence(progress, 0.1, 0.5)
    for p, share in zip(progress.tolist(), found.tolist(), strict=True):
        assert share == pytest.approx(min(1, math.sqrt(p / 0.5 * (1 - 0.1**2) + 0.1**2)))
    assert competence(progress, 0.1, 0.0).tolist() == [1.0] * 11


def test_difficulties_are_brute_force():
    for dataset in ([{"input_ids": row} for row in ROWS], datasets.Dataset.from_dict({"input_ids": ROWS})):
        asking = DifficultyCurriculum()
        assert difficulties(dataset, "length", asking).tolist() == [3, 1, 6, 2]
        counts = Counter(token for row in ROWS for token in row)
        expected = [-sum(math.log(counts[token] / 12) for token in row) for row in ROWS]
        assert difficulties(dataset, "rarity", asking).tolist() == pytest.approx(expected)
    made = datasets.Dataset.from_dict({"text": ["a b c", "a"], "rank": [1, 2]})
    made.set_transform(lambda rows: {"input_ids": [text.split() for text in rows["text"]], "twice": rows["rank"] * 2})
    assert difficulties(made, "length", DifficultyCurriculum()).tolist() == [3, 1]
    noise = np.random.default_rng(0).integers(0, 50000, 200).tolist()
    repeated = noise[:10] * 20
    ratios = difficulties([{"input_ids": noise}, {"input_ids": repeated}], "compression", DifficultyCurriculum())
    assert ratios[1] < 0.2 < 0.5 < ratios[0]
    assert difficulties([{"age": 3}, {"age": 2.5}], "age", DifficultyCurriculum("age")).tolist() == [3, 2.5]


def test_every_choice_is_from_the_admitted_and_unseen():
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(40, generator=generator)
    easiest = difficulty.argsort().tolist()
    for admitted in (torch.arange(40).clamp(min=5), torch.full((40,), 7), torch.full((40,), 40)):
        order = lay_out(difficulty, admitted, generator).tolist()
        unseen = set()
        entered = 0
        for number, i in zip(admitted.tolist(), order, strict=True):
            unseen |= set(easiest[entered:number])
            entered = max(entered, number)
            unseen = unseen or set(easiest[:number])
            assert i in unseen
            unseen.remove(i)
    first = Counter(lay_out(difficulty, torch.full((40,), 8), generator)[0].item() for _ in range(4000))
    assert set(first) == set(easiest[:8])
    assert max(abs(n / 4000 - 1 / 8) for n in first.values()) < 4 * (7 / 64 / 4000) ** 0.5


def test_all_admitted_is_the_order_of_trainer():
    order = lay_out(torch.rand(30), torch.full((30,), 30), torch.Generator().manual_seed(9))
    assert torch.equal(order, torch.randperm(30, generator=torch.Generator().manual_seed(9)))


def test_progress_within_an_epoch_is_foreseen():
    technique = DifficultyCurriculum()
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=0.5), nominal_steps=40, steps_per_epoch=10)
    technique.select(2, 4, torch.Generator())
    assert technique.progress_N_.tolist() == pytest.approx([0.5, 0.5625, 0.625, 0.6875])
    technique.run_.nominal_steps = None  # a budget in seconds
    technique.select(2, 4, torch.Generator())
    assert technique.progress_N_.tolist() == pytest.approx([0.5, 0.5625, 0.625, 0.6875])
    technique.run_.clock.progress = 0.0
    technique.select(0, 4, torch.Generator())
    assert technique.progress_N_.tolist() == pytest.approx([0, 0.25, 0.5, 0.75])


def test_one_epoch_sees_every_example_once_from_easy_to_hard(tmp_path):
    trainer = tiny_trainer([DifficultyCurriculum(end=1.0)], tmp_path, num_train_epochs=1)
    lengths = []
    trainer.model.register_forward_pre_hook(
        lambda module, _, inputs: lengths.append(inputs["attention_mask"].sum(1)) if module.training else None,
        with_kwargs=True,
    )
    trainer.train()
    expected = sorted(len(row) for row in trainer.train_dataset.rows)
    assert sorted(torch.cat(lengths).tolist()) == expected
    assert max(lengths[0].tolist()) <= expected[math.ceil(64 * math.sqrt(7 / 64 + 0.01**2))]
    means = [float(step.double().mean()) for step in lengths]
    assert means[0] < means[3] < means[-1]


def test_bad_columns_are_refused():
    asking = DifficultyCurriculum("age")
    with pytest.raises(
        ValueError, match="has no column 'age', only 'input_ids'. Set difficulty to one of them, 'length'"
    ):
        difficulties([{"input_ids": [1]}], "age", asking)
    with pytest.raises(ValueError, match="does not support nan in the column 'age' \\(example 1\\). Fill it in"):
        difficulties([{"age": 1.0}, {"age": math.nan}], "age", asking)
    with pytest.raises(ValueError, match="does not support the column 'age' because it is not numeric"):
        difficulties([{"age": "old"}], "age", asking)


def test_the_loss_is_measured_once_by_the_model_before_training(tmp_path):
    technique = DifficultyCurriculum("loss")
    trainer = tiny_trainer([technique], tmp_path / "straight", save_strategy="steps", save_steps=10)
    model = copy.deepcopy(trainer.model).eval()
    expected = []
    for row in trainer.train_dataset.rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            expected.append(float(model(input_ids=ids, labels=ids).loss))
    trainer.train()
    assert technique.difficulty_N_.tolist() == pytest.approx(expected, rel=1e-4)
    again = DifficultyCurriculum("loss")
    resumed = tiny_trainer([again], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-10"))
    assert torch.equal(again.difficulty_N_, technique.difficulty_N_)


@pytest.mark.parametrize("kind", ["length", "rarity", "compression"])
def test_padding_and_choices_are_read_as_tokens(kind):
    rows = [[5, 6, 7], [5], [8, 8, 8, 8]]
    plain = [{"input_ids": row} for row in rows]
    padded = [
        {"input_ids": row + [0] * (6 - len(row)), "attention_mask": [1] * len(row) + [0] * (6 - len(row))}
        for row in rows
    ]
    chosen = [{"input_ids": [row[:1], row[1:]]} for row in rows]
    expected = difficulties(plain, kind, DifficultyCurriculum()).tolist()
    for dataset in (padded, chosen, datasets.Dataset.from_list(padded)):
        assert difficulties(dataset, kind, DifficultyCurriculum()).tolist() == expected
    with pytest.raises(ValueError, match=r"DifficultyCurriculum\(.*None as a length in the column 'input_ids'"):
        difficulties([{"input_ids": [5]}, {"input_ids": None}], kind, DifficultyCurriculum())
