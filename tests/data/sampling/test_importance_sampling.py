import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from hf_accel.data.sampling.importance_sampling import ImportanceSampling, draw_by_importance, importances
from hf_accel.losses import head_of, weighted_mean
from hf_accel.testing import losses_of, tiny_trainer


def flat_gradient(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def test_the_gradient_is_unbiased():
    """Real gradients of a small model, as the trainer's loss makes them; a z-test along random directions."""
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
    # Some are learned and some are not, so that the probabilities differ.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(25):
        model(**{k: v[:16] for k, v in inputs.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    head = head_of(model)
    example = head.losses(model(**inputs), inputs, 24)
    losses_B = example.per_example(24)
    p_B = importances(losses_B)
    assert p_B.max() / p_B.min() > 5
    full = flat_gradient(model, model(**inputs).loss)
    per_example = torch.stack(
        [flat_gradient(model, head.losses(model(**row), row, 1).losses_BL.sum()) for row in rows_of(inputs)]
    )

    def weighted(positions, weights):
        chosen = {k: v[positions] for k, v in inputs.items()}
        count = head.count(chosen, len(positions))
        return flat_gradient(model, weighted_mean(head.losses(model(**chosen), chosen, len(positions)), count, weights))

    # What the trainer makes of one draw is the weighted mean of gradients; then many draws are cheap.
    positions, weights = draw_by_importance(p_B, 8, generator)
    assert torch.allclose(weighted(positions, weights), (weights.double() @ per_example[positions]) / 8, atol=1e-7)

    directions = torch.randn(len(full), 20, generator=generator, dtype=torch.float64)
    projected = per_example @ directions
    draws = []
    for _ in range(4000):
        positions, weights = draw_by_importance(p_B, 8, generator)
        draws.append(weights.double() @ projected[positions] / 8)
    draws = torch.stack(draws)
    z = (draws.mean(0) - full @ directions) / (draws.std(0) / math.sqrt(len(draws)))
    assert draws.std(0).min() > 0 and z.abs().max() < 4.5
    # Without weights the same test fails: it has the power to see a bias.
    biased = torch.stack([projected[draw_by_importance(p_B, 8, generator)[0]].mean(0) for _ in range(4000)])
    z = (biased.mean(0) - full @ directions) / (biased.std(0) / math.sqrt(len(biased)))
    assert z.abs().max() > 6
    # And the variance is lower than that of uniform draws.
    uniform = torch.stack([projected[torch.randint(24, (8,), generator=generator)].mean(0) for _ in range(4000)])
    assert draws.var(0).sum() < 0.8 * uniform.var(0).sum()


def rows_of(inputs):
    return [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(inputs["labels"]))]


def test_the_score_bounds_the_gradient_with_respect_to_the_logits():
    generator = torch.Generator().manual_seed(2)
    for classes in (2, 5, 100):
        logits = 3 * torch.randn(50, classes, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (50,), generator=generator)
        norms = (logits.softmax(-1) - F.one_hot(labels, classes)).norm(dim=-1)
        scores = importances(F.cross_entropy(logits, labels, reduction="none"))
        ratios = norms / scores
        assert ratios.max() / ratios.min() <= math.sqrt(2) + 1e-6
        if classes == 2:
            assert ratios.max() / ratios.min() == pytest.approx(1)


def test_tau_is_that_of_the_paper():
    """1 / tau = sqrt(1 - || g - u ||^2 / || g ||^2), g the normalized scores and u uniform."""
    technique = started(threshold=0.0)
    losses = torch.tensor([0.1, 2.0, 0.0, 5.0])
    technique.step_select(torch.arange(4), losses)
    scores = [1 - math.exp(-loss) if loss else 1e-6 for loss in losses.tolist()]
    g = [s / sum(scores) for s in scores]
    inverse = math.sqrt(1 - sum((x - 1 / 4) ** 2 for x in g) / sum(x**2 for x in g))
    assert technique.tau_ == pytest.approx(1 / inverse, rel=1e-5)


def started(step=0, **fields):
    technique = ImportanceSampling(**fields)
    technique.run_ = SimpleNamespace(state=SimpleNamespace(global_step=step), stream=SimpleNamespace(seed=0))
    technique.on_train_begin(None, None, None)
    return technique


def test_it_samples_only_where_that_pays():
    technique = started(keep=0.25)
    even, uneven = torch.ones(8), torch.tensor([3.0] + [1e-4] * 7)
    positions, weights = technique.step_select(torch.arange(8), even)
    assert positions.tolist() == list(range(8)) and weights is None and technique.tau_ == pytest.approx(1)
    technique.run_.state.global_step = 7
    assert not technique.needs_step_losses()
    technique.run_.state.global_step = 10
    assert technique.needs_step_losses()
    for _ in range(30):
        positions, weights = technique.step_select(torch.arange(8), uneven)
    assert technique.tau_ > (1 / 0.25 + 3) / 3
    assert len(positions) == len(weights) == 2 and (positions.diff() >= 0).all()
    technique.run_.state.global_step = 7
    assert technique.needs_step_losses()
    report = technique.report()
    assert report["judged"] == 31 and 0 < report["sampled"] < 31


def test_sampled_steps_are_smaller(tmp_path):
    trainer = tiny_trainer([ImportanceSampling(keep=0.25, threshold=0.0)], tmp_path)
    trainer.train()
    assert trainer.receipt.samples == 24 * 2
    assert trainer.receipt.techniques[0]["report"]["sampled"] == 24
    assert all(map(math.isfinite, losses_of(trainer)))


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"threshold": -1.0}, {"check_every": 0}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"ImportanceSampling\\({name}="):
        ImportanceSampling(**fields)
