import datasets
import pytest
import torch
from transformers import BertForMultipleChoice

from hf_accel import AccelTrainer
from hf_accel.data.sampling.coreset import Coreset, k_center
from hf_accel.testing import CountingText, collate_padded, tiny_bert, tiny_llama, tiny_trainer


def by_hand(points, number):
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]

    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    centers = [min(range(len(points)), key=lambda i: distance(points[i], mean))]
    while len(centers) < number:
        others = [i for i in range(len(points)) if i not in centers]
        centers.append(max(others, key=lambda i: min(distance(points[i], points[c]) for c in centers)))
    return centers


def test_centers_are_those_of_brute_force():
    for seed in range(10):
        points = torch.randn(25, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert k_center(points, 9).tolist() == by_hand(points.tolist(), 9)


def test_centers_cover_better_than_chance():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 2, generator=generator)

    def radius(ids):
        return torch.cdist(points, points[ids]).min(1).values.max()

    centers = k_center(points, 20)
    assert all(radius(centers) < radius(torch.randperm(200, generator=generator)[:20]) for _ in range(20))
    assert torch.cdist(points[centers], points[centers]).fill_diagonal_(9e9).min() >= radius(centers)


def test_points_at_one_place_are_each_chosen_once():
    assert sorted(k_center(torch.ones(5, 2), 5).tolist()) == list(range(5))


def test_points_are_the_mean_hidden_states(tmp_path):
    technique = Coreset(keep=0.3)
    trainer = tiny_trainer([technique], tmp_path, dropout=0.0, dtype=torch.float64)
    chosen = technique.prepare_dataset(trainer.train_dataset)
    model, rows = tiny_llama(dropout=0.0, dtype=torch.float64).eval(), CountingText()
    with torch.no_grad():
        inputs = [collate_padded([rows[i]]) for i in range(64)]
        points = [model(**i, output_hidden_states=True).hidden_states[-1][0].mean(0).float().tolist() for i in inputs]
    assert technique.ids_N_.tolist() == sorted(by_hand(points, 19))
    assert len(chosen) == 19


def test_points_come_from_a_column(tmp_path):
    technique = Coreset(keep=0.5, column="point")
    tiny_trainer([technique], tmp_path)
    points = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).tolist()
    chosen = technique.prepare_dataset(datasets.Dataset.from_dict({"point": points}))
    assert technique.ids_N_.tolist() == sorted(by_hand(points, 6)) and len(chosen) == 6
    points[3][1] = float("nan")
    with pytest.raises(ValueError, match="Coreset.*1 of 12 points are not finite"):
        technique.prepare_dataset(datasets.Dataset.from_dict({"point": points}))
    with pytest.raises(ValueError, match="Coreset.*no column 'point', only 'x'"):
        technique.prepare_dataset(datasets.Dataset.from_dict({"x": [1]}))


def test_a_bad_value_names_itself():
    with pytest.raises(ValueError, match="Coreset\\(keep="):
        Coreset(keep=0)


def choices(feature):
    return [{"input_ids": row, "labels": row} for row in (feature["input_ids"], feature["input_ids"][2::-1])]


def test_the_point_of_an_example_is_the_mean_of_its_choices(tmp_path):
    def collate(features):
        flat = collate_padded([choice for feature in features for choice in choices(feature)])
        inputs = {name: flat[name].unflatten(0, (-1, 2)) for name in ("input_ids", "attention_mask")}
        return inputs | {"labels": torch.zeros(len(features), dtype=torch.long)}

    technique, rows = Coreset(keep=0.25), CountingText()
    model = tiny_bert(kind=BertForMultipleChoice, dropout=0.0, dtype=torch.float64)
    args = tiny_trainer([], tmp_path).args
    AccelTrainer(model, args, train_dataset=rows, data_collator=collate, techniques=[technique])
    technique.prepare_dataset(rows)
    model.eval()
    with torch.no_grad():
        hidden = [
            [model.bert(torch.tensor([c["input_ids"]]))[0][0].mean(0) for c in choices(rows[i])] for i in range(64)
        ]
    points = [torch.stack(both).mean(0).float().tolist() for both in hidden]
    assert technique.ids_N_.tolist() == sorted(by_hand(points, 16))


@pytest.mark.parametrize("points", [[[1.0, 2.0], [1.0]], [None, [1.0]], ["a", "b"]])
def test_what_is_no_point_is_refused(points, tmp_path):
    technique = Coreset(column="point")
    tiny_trainer([technique], tmp_path)
    with pytest.raises(ValueError, match=r"Coreset.*'point'"):
        technique.prepare_dataset([{"point": point} for point in points])
