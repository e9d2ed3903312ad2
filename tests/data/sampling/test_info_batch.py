import math
import random
from types import SimpleNamespace

import pytest
import torch

from hf_accel.data.sampling.info_batch import InfoBatch, prune_learnt


def started(progress=0.0, **fields):
    technique = InfoBatch(**fields)
    technique.host_ = SimpleNamespace(clock=SimpleNamespace(progress=progress))
    technique.on_train_begin(None, None, None)
    return technique


def test_the_choice_is_that_of_brute_force():
    draw = random.Random(0)
    for trial in range(50):
        scores = [draw.choice([draw.random(), math.nan]) for _ in range(draw.randint(2, 30))]
        keep = draw.uniform(0.05, 1)
        ids, weights = prune_learnt(torch.tensor(scores), keep, torch.Generator().manual_seed(trial))
        seen = torch.tensor([s for s in scores if s == s])
        low = [i for i, s in enumerate(scores) if s < float(seen.mean())] if len(seen) else []
        kept = [i for i in ids.tolist() if i in low]
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert set(range(len(scores))) - set(low) <= set(ids.tolist())
        assert len(kept) == (max(round(keep * len(low)), 1) if low else 0)
        for i, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            assert weight == pytest.approx(len(low) / len(kept) if i in low else 1.0)


def test_the_weighted_sum_is_unbiased():
    losses = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    generator = torch.Generator().manual_seed(2)
    sums = []
    for _ in range(4000):
        ids, weights = prune_learnt(losses.float(), 0.3, generator)
        sums.append(float((losses[ids] * weights.double()).sum()))
    mean = sum(sums) / len(sums)
    spread = math.sqrt(sum((s - mean) ** 2 for s in sums) / (len(sums) - 1))
    assert spread > 0
    assert abs(mean - float(losses.sum())) < 4 * spread / math.sqrt(len(sums)) + 1e-5


def test_epochs_without_scores_and_after_the_end_are_full_and_draw_nothing():
    generator = torch.Generator().manual_seed(3)
    technique = started()
    ids, weights = technique.select(0, 10, generator)
    assert ids.tolist() == list(range(10)) and weights is None
    technique.observe(torch.arange(10), torch.arange(10.0))
    ids, weights = technique.select(1, 10, generator)
    assert len(ids) == 7 and ids.tolist()[-5:] == [5, 6, 7, 8, 9]  # round(2.5) = 2 of the five low ones
    assert sorted(weights.tolist()) == [1.0] * 5 + [2.5] * 2
    technique.host_.clock.progress = 0.875
    assert technique.select(2, 10, generator)[1] is None
    assert technique.report() == {"kept": 27 / 30} and technique.took_effect(technique.report())

    before = generator.get_state()
    started(keep=1.0).select(0, 10, generator)
    assert torch.equal(generator.get_state(), before)


def test_the_state_goes_on_with_the_same_choice():
    technique = started()
    technique.select(0, 20, torch.Generator())
    technique.observe(torch.tensor([3, 1]), torch.tensor([0.5, 2.0], dtype=torch.float64))
    other = started()
    other.load_state_dict("global", technique.state_dict("global"))
    chosen = [t.select(1, 20, torch.Generator().manual_seed(7)) for t in (technique, other)]
    assert torch.equal(chosen[0][0], chosen[1][0]) and technique.report() == other.report()
    assert technique.state_dict("rank") == {}


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"keep": 1.5}, {"end": -0.1}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"InfoBatch\\({name}="):
        InfoBatch(**fields)
