import math

import pytest

from hf_accel import Budget
from hf_accel.clock import Clock, parse_budget, passes


class FakeTime:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(
    "text, unit, amount",
    [
        ("30min", "seconds", 1800),
        ("1h 30min", "seconds", 5400),
        ("1.5h", "seconds", 5400),
        ("90 s", "seconds", 90),
        ("500steps", "steps", 500),
        ("2 epochs", "epochs", 2),
        ("1e9tok", "tokens", 1e9),
        ("2e6 samples", "samples", 2e6),
        ("1d", "seconds", 86400),
    ],
)
def test_amounts_are_read(text, unit, amount):
    assert parse_budget(text) == (unit, amount)


@pytest.mark.parametrize(
    "text, part",
    [
        ("3 parsecs", "no unit 'parsecs'"),
        ("30", "no unit ''"),
        ("soon", "not an amount"),
        ("0min", "must be > 0"),
        ("-3min", "not an amount"),
        ("1.2.3h", "not a number"),
        ("1h 3steps", "one text has one unit"),
        ("", "not an amount"),
    ],
)
def test_bad_amounts_name_themselves(text, part):
    with pytest.raises(ValueError) as error:
        Budget(text)
    assert part in str(error.value) and repr(text) in str(error.value)


def test_two_limits_in_one_unit_are_refused():
    with pytest.raises(ValueError, match="each unit may be limited once"):
        Budget(["1h", "30min"])


def test_the_first_limit_reached_is_progress():
    clock = Clock({"steps": 10, "samples": 40})
    clock.start()
    seen = []
    for _ in range(5):
        clock.advance(samples=8)
        seen.append(clock.progress)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and clock.done


@pytest.mark.parametrize("reserve", [0.0, 7.0])
@pytest.mark.parametrize("step", [0.3, 1.0, 2.7])
def test_seconds_are_kept_with_what_the_end_costs(step, reserve):
    time = FakeTime()
    clock = Clock({"seconds": 60.0}, now=time)
    clock.reserve = reserve
    clock.start()
    steps = 0
    while not clock.done:
        clock.step_begins()
        time.seconds += step
        clock.advance()
        steps += 1
        assert steps < 1000
    time.seconds += reserve
    # Within one step of the limit, and never beyond it.
    assert 60.0 - step <= clock.seconds + 1e-9 and clock.seconds <= 60.0 + 1e-9
    assert clock.progress == 1.0


def test_a_first_step_that_compiles_does_not_end_the_run():
    time = FakeTime()
    clock = Clock({"seconds": 60.0}, now=time)
    clock.start()
    durations = [35.0, *[1.0] * 100]
    for duration in durations:
        clock.step_begins()
        time.seconds += duration
        clock.advance()
        if clock.done:
            break
    assert clock.seconds == 60.0 and clock.spent["steps"] == 26


def test_a_first_step_that_takes_the_whole_budget_ends_the_run():
    time = FakeTime()
    clock = Clock({"seconds": 60.0}, now=time)
    clock.start()
    clock.step_begins()
    time.seconds += 60.0
    clock.advance()
    assert clock.done


@pytest.mark.parametrize("every, times", [(0.1, 10), (0.05, 20), (0.2, 5)])
def test_every_share_of_a_run_is_passed_once(every, times):
    passed = [step for step in range(1, 1001) if passes((step - 1) / 1000, step / 1000, every)]
    assert passed == [1000 * (i + 1) // times for i in range(times)]


def test_a_slower_machine_overruns_by_at_most_a_step():
    time = FakeTime()
    clock = Clock({"seconds": 60.0}, now=time)
    clock.start()
    duration = 0.5
    while not clock.done:
        clock.step_begins()
        if clock.seconds > 30:
            duration = 3.0
        time.seconds += duration
        clock.advance()
    assert clock.seconds <= 63.0


def test_progress_never_goes_back_and_survives():
    time = FakeTime()
    clock = Clock({"seconds": 10.0}, now=time)
    clock.reserve = 5.0
    clock.start()
    time.seconds += 2
    clock.advance()
    before = clock.progress
    clock.reserve = 1.0
    clock.advance()
    assert clock.progress == before
    other = Clock({"seconds": 10.0}, now=time)
    other.load_state_dict(clock.state_dict())
    other.start()
    assert other.progress == before and math.isclose(other.seconds, clock.seconds)


def test_what_is_set_aside_is_before_progress():
    now = FakeTime()
    clock = Clock({"steps": 10, "seconds": 40}, now=now)
    clock.start()
    now.seconds += 8
    clock.excluded_cost = {"steps": 2, "seconds": 8}
    seen = []
    for _ in range(4):
        clock.step_begins()
        now.seconds += 1
        clock.advance()
        seen.append(clock.progress)
    assert seen == [1 / 8, 2 / 8, 3 / 8, 4 / 8] and clock.spent["seconds"] == 12

    # A run that goes on has it aside, too.
    resumed = Clock({"steps": 10, "seconds": 40}, now=now)
    resumed.load_state_dict(clock.state_dict())
    resumed.start()
    resumed.advance()
    assert resumed.progress == 5 / 8 and resumed.seconds == 12

    # Seconds go up to their own limit.
    now.seconds += 27
    resumed.step_begins()
    now.seconds += 1
    resumed.advance()
    assert resumed.done and resumed.seconds == 40


@pytest.mark.parametrize(
    "text, unit, amount",
    [
        ("1e15flop", "flops", 1e15),
        ("2.5 PFLOP", "flops", 2.5e15),
        ("50kJ", "joules", 5e4),
        ("1Wh", "joules", 3600),
        ("0.5 kWh", "joules", 1.8e6),
        ("300 joules", "joules", 300),
    ],
)
def test_operations_and_energy_are_read(text, unit, amount):
    assert parse_budget(text) == (unit, amount)


@pytest.mark.parametrize("unit", ["tokens", "flops", "joules"])
@pytest.mark.parametrize("cost", [1.0, 3.0, 7.0])
def test_what_is_known_only_afterwards_stays_below_the_limit(unit, cost):
    clock = Clock({unit: 100.0})
    clock.start()
    steps = 0
    while not clock.done:
        clock.advance(**{unit: cost})
        steps += 1
    assert steps == 100 // cost and clock.progress == 1.0


def test_the_end_takes_energy_as_the_run_did():
    now = FakeTime()
    clock = Clock({"joules": 1000.0}, now=now)
    clock.reserve = 10.0
    clock.start()
    while not clock.done:
        clock.step_begins()
        now.seconds += 0.5
        clock.advance(joules=5.0)  # ten watts, a hundred joules for the end
    assert clock.spent["joules"] == 900.0


def test_ranks_that_measure_differently_do_as_the_first():
    told = []

    def first(values):
        told.append(values)
        return [0.25, 1.0]

    clock = Clock({"seconds": 60.0, "steps": 100}, now=FakeTime(), share=first)
    clock.start()
    clock.advance()
    assert len(told) == 1 and clock.done


def test_what_operations_were_spent_survives():
    clock = Clock({"flops": 100.0})
    clock.start()
    clock.advance(flops=30.0)
    clock.model_flops = 20.0
    other = Clock({"flops": 100.0})
    other.load_state_dict(clock.state_dict())
    assert other.spent["flops"] == 30.0 and other.model_flops == 20.0 and other.progress == 0.3
