import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_accel.data.sampling.info_batch import InfoBatch, prune_learned
from hf_accel.losses import head_of, weighted_mean


def started(progress=0.0, **fields):
    technique = InfoBatch(**fields)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=progress))
    technique.on_train_begin(None, None, None)
    return technique


def test_the_choice_is_that_of_brute_force():
    draw = random.Random(0)
    for trial in range(50):
        scores = [draw.choice([draw.random(), math.nan]) for _ in range(draw.randint(2, 30))]
        keep = draw.uniform(0.05, 1)
        ids, weights = prune_learned(torch.tensor(scores), keep, torch.Generator().manual_seed(trial))
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
        ids, weights = prune_learned(losses.float(), 0.3, generator)
        sums.append(float((losses[ids] * weights.double()).sum()))
    mean = sum(sums) / len(sums)
    spread = math.sqrt(sum((s - mean) ** 2 for s in sums) / (len(sums) - 1))
    assert spread > 0
    assert abs(mean - float(losses.sum())) < 4 * spread / math.sqrt(len(sums)) + 1e-5


def test_the_expected_weighted_gradient_is_the_full_one():
    """Real gradients of a small model in the trainer's own loss, over an epoch of steps; a z-test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
        model = BertForSequenceClassification(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(20, (24, 5), generator=generator),
        "labels": torch.randint(3, (24,), generator=generator),
    }
    head = head_of(model)

    def gradient(ids_N, weights_N):
        """Of an epoch: steps of four examples, each weighted and divided by what it counts, times its size."""
        total = 0
        for step in torch.arange(len(ids_N)).split(4):
            chosen = {name: values[ids_N[step]] for name, values in inputs.items()}
            losses = head.losses(model(**chosen), chosen, len(step))
            total = total + weighted_mean(losses, head.count(chosen, len(step)), weights_N[step]) * len(step)
        gradients = torch.autograd.grad(total, model.parameters(), allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    full = gradient(torch.arange(24), torch.ones(24).double())
    per_example = torch.stack([gradient(torch.tensor([i]), torch.ones(1).double()) for i in range(24)])
    scores = head.losses(model(**inputs), inputs, 24).per_example(24)

    ids, weights = prune_learned(scores, 0.3, generator)
    assert torch.allclose(gradient(ids, weights.double()), weights.double() @ per_example[ids])
    directions = torch.randn(len(full), 20, generator=generator, dtype=torch.float64)
    projected = per_example @ directions

    def z_scores(weighted):
        draws = []
        for _ in range(3000):
            ids, weights = prune_learned(scores, 0.3, generator)
            draws.append((weights.double() if weighted else torch.ones(len(ids)).double()) @ projected[ids])
        draws = torch.stack(draws)
        return (draws.mean(0) - full @ directions) / (draws.std(0) / math.sqrt(len(draws)))

    assert z_scores(weighted=True).abs().max() < 4.5
    assert z_scores(weighted=False).abs().max() > 20  # the test would see a bias


def test_epochs_without_scores_and_after_the_end_are_full_and_draw_nothing():
    generator = torch.Generator().manual_seed(3)
    technique = started()
    ids, weights = technique.select(0, 10, generator)
    assert ids.tolist() == list(range(10)) and weights is None
    technique.observe(torch.arange(10), torch.arange(10.0))
    ids, weights = technique.select(1, 10, generator)
    assert len(ids) == 7 and ids.tolist()[-5:] == [5, 6, 7, 8, 9]  # round(2.5) = 2 of the five low ones
    assert sorted(weights.tolist()) == [1.0] * 5 + [2.5] * 2
    technique.run_.clock.progress = 0.875
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
