from fractions import Fraction

import pytest

from hf_accel.optim.learning_rate.rex import REX


@pytest.mark.parametrize("warmup", [0, Fraction(1, 20), Fraction(3, 10)])
def test_it_is_the_published_shape_after_a_straight_warm_up(warmup):
    schedule = REX(warmup=float(warmup)).schedule
    for step in range(401):
        progress = Fraction(step, 400)
        decayed = (progress - warmup) / (1 - warmup)
        # As published: (1 - t/T) / (1/2 + (1 - t/T) / 2).
        expected = progress / warmup if progress < warmup else (1 - decayed) / (Fraction(1, 2) + (1 - decayed) / 2)
        assert schedule(float(progress)) == pytest.approx(float(expected), abs=1e-12)
    assert schedule(1.0) == 0.0


def test_the_docstring_is_right_about_it():
    schedule = REX(warmup=0.0).schedule
    assert schedule(0.5) == pytest.approx(2 / 3)
    assert sum(schedule((i + 0.5) / 10_000) for i in range(10_000)) / 10_000 == pytest.approx(0.6137, abs=1e-4)
    assert schedule(1 - 1e-6) / 1e-6 == pytest.approx(2, rel=1e-5)
