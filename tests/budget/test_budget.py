"""`hf_accel.budget.budget`: limits as they are written, and progress against a count in fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hf_accel import Budget
from hf_accel.clock import Clock

HAND_WRITTEN = {
    "500steps": {"steps": 500},
    "1.5epochs": {"epochs": 1.5},
    "1e9tok": {"tokens": 1e9},
    "30min": {"seconds": 1800},
    "2h": {"seconds": 7200},
    "2d": {"seconds": 172800},
}


@pytest.mark.parametrize("text", HAND_WRITTEN)
def test_a_limit_is_an_amount_of_one_unit(text):
    assert Budget(text).budget() == HAND_WRITTEN[text] == Budget([text]).budget()


@pytest.mark.parametrize("limit", [[], ["1h", "30min"], ["5steps", "5 steps"]])
def test_a_unit_is_limited_once_and_one_is(limit):
    with pytest.raises(ValueError, match="each unit may be limited once"):
        Budget(limit)


def test_the_first_limit_that_is_reached_ends_the_run():
    """Steps of 4, 8, 12 ... samples and 30 tokens each, against a count that shares no code with the clock."""
    limits = Budget(["100samples", "200tok", "9steps"]).budget()
    clock = Clock(limits)
    samples, tokens, steps, seen = 0, 0, 0, []
    while not clock.done:
        clock.advance(samples=4 * (steps + 1), tokens=30)
        samples, tokens, steps = samples + 4 * (steps + 1), tokens + 30, steps + 1
        exact = max(Fraction(samples, 100), Fraction(tokens, 200), Fraction(steps, 9))
        seen.append(clock.progress == pytest.approx(float(min(exact, 1))))
    assert all(seen) and (samples, tokens, steps) == (112, 210, 7)


def test_going_on_under_another_limit_is_another_share():
    short, long = Clock(Budget("12steps").budget()), Clock(Budget("48steps").budget())
    while not short.done:
        short.advance()
    long.load_state_dict(short.state_dict())
    assert (long.progress, long.done) == (0.25, False)
    same = Clock(Budget("12steps").budget())
    same.load_state_dict(short.state_dict())
    assert (same.progress, same.done) == (1.0, True)
