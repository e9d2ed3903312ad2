import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from hf_accel.data.sampling.score_pruning import ScorePruning
from hf_accel.testing import CountingText, collate_padded, tiny_llama, tiny_trainer


def by_hand(kind):
    """Scores of all examples from one forward pass each, with the definitions."""
    model = tiny_llama(dropout=0.0, dtype=torch.float64).eval()
    rows, scores = CountingText(), []
    for i in range(len(rows)):
        inputs = collate_padded([rows[i]])
        outputs = model(**inputs)
        logits, labels = outputs.logits[0, :-1], inputs["labels"][0, 1:]
        if kind == "el2n":
            score = (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).norm(dim=-1).mean()
        elif kind == "grand":
            outputs.loss.backward()
            score = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            model.zero_grad()
        else:
            score = F.cross_entropy(logits, labels)
            score = score.exp() if kind == "perplexity" else score
        scores.append(score.item())
    return scores


def prepared(technique, directory, dataset=None, **args):
    trainer = tiny_trainer([technique], directory, dropout=0.0, dtype=torch.float64, **args)
    return technique.prepare_dataset(trainer.train_dataset if dataset is None else dataset)


@pytest.mark.parametrize("kind", ["el2n", "grand", "loss", "perplexity"])
@pytest.mark.parametrize("prefer", ["hard", "easy"])
def test_scores_are_those_of_the_definitions(kind, prefer, tmp_path):
    technique = ScorePruning(score=kind, keep=0.4, prefer=prefer)
    chosen = prepared(technique, tmp_path)
    scores = by_hand(kind)
    ranked = sorted(range(64), key=lambda i: scores[i], reverse=prefer == "hard")
    assert technique.ids_N_.tolist() == sorted(ranked[:26])
    assert technique.report()["edge"] == pytest.approx(scores[ranked[25]], rel=1e-4)
    assert [row["input_ids"] for row in chosen] == [CountingText()[i]["input_ids"] for i in sorted(ranked[:26])]


def test_scoring_leaves_model_and_generators_as_found(tmp_path):
    technique = ScorePruning(score="grand")
    trainer = tiny_trainer([technique], tmp_path)
    trainer.model.train()
    trainer.model.model.norm.eval()
    random = torch.random.get_rng_state()
    technique.prepare_dataset(trainer.train_dataset)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert trainer.model.training and not trainer.model.model.norm.training
    assert all(p.grad is None for p in trainer.model.parameters())


def test_scores_come_from_a_column_or_a_file(tmp_path):
    scores = np.random.default_rng(0).permutation(64).astype(float)
    table = datasets.Dataset.from_dict({"input_ids": CountingText().rows, "difficulty": scores})
    np.save(tmp_path / "scores.npy", scores)
    np.savetxt(tmp_path / "scores.txt", scores)
    kept = []
    for source in ("column:difficulty", f"file:{tmp_path}/scores.npy", f"file:{tmp_path}/scores.txt"):
        technique = ScorePruning(source, keep=0.25)
        chosen = prepared(technique, tmp_path, table)
        assert isinstance(chosen, datasets.Dataset) and sorted(chosen["difficulty"]) == list(range(48, 64))
        kept.append(technique.ids_N_.tolist())
    assert kept[0] == kept[1] == kept[2] == sorted(kept[0])


def test_classes_keep_their_shares(tmp_path):
    scores = list(range(100))
    table = datasets.Dataset.from_dict({"s": scores, "kind": ["a"] * 80 + ["b"] * 20})
    technique = ScorePruning("column:s", keep=0.25, balance="kind")
    prepared(technique, tmp_path, table)
    assert technique.ids_N_.tolist() == [*range(60, 80), *range(95, 100)]


def test_chance_decides_between_equal_scores(tmp_path):
    table = datasets.Dataset.from_dict({"s": [1.0] * 64})
    first, other = ScorePruning("column:s", keep=0.5), ScorePruning("column:s", keep=0.5)
    prepared(first, tmp_path, table, seed=1)
    prepared(other, tmp_path, table, seed=2)
    assert first.ids_N_.tolist() != other.ids_N_.tolist() and first.ids_N_.max() > 40


TABLE = {"label": [0] * 9 + [1], "s": [2.0] * 9 + [1.0], "bad": [1.0] * 8 + [math.nan] * 2, "words": ["x"] * 10}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"score": "column:difficulty"}, "no column 'difficulty', only 'label', 's', 'bad', 'words'"),
        ({"score": "column:bad"}, "2 of 10 scores are nan"),
        ({"score": "column:s"}, "would keep no example of class 1. Set a larger keep or balance='label'"),
        ({"score": "column:s", "keep": 0.4, "balance": "label"}, "would keep none of the 1 examples of class 1"),
        ({"score": "file:nowhere.npy"}, "the file 'nowhere.npy' does not exist"),
        ({"score": "column:words"}, "'x' in the column 'words'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(fields, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"ScorePruning.*{sentence}"):
        prepared(ScorePruning(**fields), tmp_path, datasets.Dataset.from_dict(TABLE))


def test_scores_of_the_wrong_length_are_refused(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"ScorePruning.*shape \(3,\) for 10 examples"):
        prepared(ScorePruning(f"file:{tmp_path}/s.npy"), tmp_path, datasets.Dataset.from_dict(TABLE))


def test_streams_of_examples_are_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"s": 1.0}])

    for stream in (Stream(), datasets.IterableDataset.from_generator(lambda: iter([{"s": 1.0}]))):
        with pytest.raises(ValueError, match="ScorePruning.*by index"):
            prepared(ScorePruning("column:s"), tmp_path, stream)


def test_a_resumed_run_with_other_data_is_refused(tmp_path):
    trainer = tiny_trainer([ScorePruning()], tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    other = tiny_trainer([ScorePruning()], tmp_path / "other")
    other.train_dataset = CountingText(70)
    with pytest.raises(ValueError, match="ScorePruning.*chose from 64 examples.*has 70 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("fields", [{"score": "margin"}, {"keep": 0.0}, {"prefer": "middle"}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"ScorePruning\\({name}="):
        ScorePruning(**fields)
