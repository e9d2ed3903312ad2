import math
from types import SimpleNamespace

import pytest
import torch

from hf_accel.data.sampling.early_score_pruning import EarlyScorePruning
from hf_accel.testing import tiny_trainer


def started(progress=0.0, classes=None, **fields):
    technique = EarlyScorePruning(**fields)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=progress))
    technique.inspect_dataset([{"label": c} for c in classes] if classes else [{}])
    technique.on_train_begin(None, None, None)
    return technique


def watched(technique, epochs):
    """Two thirds of the way in, after epochs with these losses."""
    for number, losses in enumerate(epochs):
        technique.select(number, len(losses), torch.Generator().manual_seed(number))
        for half in (torch.arange(0, len(losses), 2), torch.arange(1, len(losses), 2)):
            technique.observe(half, torch.tensor(losses)[half])
    technique.run_.clock.progress = 0.7
    return technique.select(len(epochs), len(epochs[0]), torch.Generator().manual_seed(9))[0].tolist()


EPOCHS = [[2.0, 0.1, 3.0, 0.3, 0.6], [0.2, 0.1, 3.0, 0.9, 0.6], [1.5, 0.1, 3.0, 0.2, 0.6], [0.1, 0.1, 3.0, 0.9, 0.6]]


def test_forgetting_counts_what_was_learned_and_lost():
    # 0 is forgotten once, 3 twice, 2 is never learned, 1 and 4 are never forgotten.
    assert watched(started(score="forgetting", keep=0.4), EPOCHS) == [2, 3]
    assert watched(started(score="forgetting", keep=0.6), EPOCHS) == [0, 2, 3]


@pytest.mark.parametrize("score", ["el2n", "loss"])
def test_scores_are_means_over_epochs(score):
    technique = started(score=score, keep=0.6)
    kept = watched(technique, EPOCHS)
    columns = list(zip(*EPOCHS, strict=True))
    value = {"loss": lambda x: x, "el2n": lambda x: math.sqrt(2) * (1 - math.exp(-x))}[score]
    means = [sum(map(value, column)) / 4 for column in columns]
    assert technique.scores().tolist() == pytest.approx(means, rel=1e-6)
    assert kept == sorted(sorted(range(5), key=lambda i: -means[i])[:3])


def test_the_error_norm_of_two_classes_is_exact():
    technique = started()
    logits = torch.tensor([[0.3, -1.0], [2.0, 1.0]])
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    technique.select(0, 2, torch.Generator())
    technique.observe(torch.arange(2), losses)
    norms = (logits.softmax(-1) - torch.eye(2)).norm(dim=-1)
    assert technique.scores().tolist() == pytest.approx(norms.tolist(), rel=1e-5)


def test_classes_keep_their_shares():
    assert watched(started(score="loss", keep=0.5, balance="label", classes="aabb"), [[9.0, 8.0, 1.0, 2.0]]) == [0, 3]
    with pytest.raises(ValueError, match="EarlyScorePruning.*would keep none of the 1 examples of class 'b'"):
        started(keep=0.4, balance="label", classes="aaab")


def test_the_choice_is_kept_and_goes_on(tmp_path):
    technique = started(keep=0.4)
    kept = watched(technique, EPOCHS)
    technique.observe(torch.arange(5), torch.zeros(5))
    assert technique.select(5, 5, torch.Generator())[0].tolist() == kept
    other = started(keep=0.4)
    other.load_state_dict("global", technique.state_dict("global"))
    assert other.select(5, 5, torch.Generator())[0].tolist() == kept and other.report() == {"kept": 0.4}


def test_epochs_before_are_full(tmp_path):
    trainer = tiny_trainer([EarlyScorePruning(keep=0.5, after=0.4)], tmp_path)
    trainer.train()
    assert trainer.receipt.samples == 64 + 64 + 32
    assert trainer.receipt.techniques[0]["report"] == {"kept": 0.5}


@pytest.mark.parametrize("fields", [{"score": "margin"}, {"keep": 0.0}, {"after": 2.0}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"EarlyScorePruning\\({name}="):
        EarlyScorePruning(**fields)
