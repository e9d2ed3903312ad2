import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hf_accel.data.sampling.selective_backprop import SelectiveBackprop, draw_high_losses
from hf_accel.testing import tiny_trainer


def brute_force(losses, keep, number):
    """Probability of each example to be drawn: of all ordered draws without replacement."""
    size = len(losses)
    p = [((sorted(losses).index(loss) + 0.5) / size) ** (1 / keep - 1) for loss in losses]
    total = [0.0] * size
    for draw in itertools.permutations(range(size), number):
        probability, left = 1.0, sum(p)
        for i in draw:
            probability *= p[i] / left
            left -= p[i]
        for i in draw:
            total[i] += probability
    return total


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_the_draw_is_that_of_brute_force(keep):
    losses = [0.3, 5.0, 0.1, 2.0, 0.2, 0.7]
    number = max(round(keep * 6), 1)
    generator = torch.Generator().manual_seed(0)
    counts, draws = torch.zeros(6), 3000
    for _ in range(draws):
        positions = draw_high_losses(torch.tensor(losses), keep, generator)
        assert len(positions) == number and (positions.diff() > 0).all()
        counts[positions] += 1
    for share, p in zip((counts / draws).tolist(), brute_force(losses, keep, number), strict=True):
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_a_large_step_and_a_small_share_draw_the_highest():
    losses = torch.arange(4096.0)
    positions = draw_high_losses(losses, 0.01, torch.Generator().manual_seed(0))
    assert len(positions) == 41 and positions.min() > 3800


def test_it_acts_between_start_and_end_but_on_plain_steps():
    technique = SelectiveBackprop(start=0.5, end=0.9, plain_every=3)
    technique.run_ = SimpleNamespace(state=SimpleNamespace(global_step=0), clock=SimpleNamespace(progress=0.5))

    def acts(step, progress):
        technique.run_.state.global_step, technique.run_.clock.progress = step, progress
        return technique.needs_step_losses()

    assert [acts(step, 0.6) for step in range(6)] == [True, True, False, True, True, False]
    assert not acts(0, 0.49) and acts(0, 0.5) and not acts(0, 0.9)
    technique.plain_every = 0
    assert all(acts(step, 0.6) for step in range(6))


def test_steps_that_are_not_judged_cost_no_forward_pass(tmp_path):
    """Counted at the model's door: one pass of every step, and one more of those that are judged."""
    passes = {"judging": 0, "training": 0}

    def count(module, args):
        if module.training:
            passes["training" if torch.is_grad_enabled() else "judging"] += 1

    trainer = tiny_trainer([SelectiveBackprop()], tmp_path)
    trainer.model.register_forward_pre_hook(count)
    trainer.train()
    report = trainer.receipt.techniques[0]["report"]
    assert passes["training"] == 24 and passes["judging"] == report["judged"] / 8
    assert trainer.receipt.samples == 24 * 8 - report["judged"] * (1 - report["kept"])
    assert report["kept"] == 0.5 and report["judged"] == 8 * sum(step % 2 == 0 for step in range(12, 22))


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"start": 1.5}, {"end": -1.0}, {"plain_every": -1}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"SelectiveBackprop\\({name}="):
        SelectiveBackprop(**fields)
