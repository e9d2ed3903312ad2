from __future__ import annotations

import json

import pytest

from hf_accel import evidence
from hf_accel.evidence import cards
from hf_accel.optim.averaging.ema import ExponentialMovingAverage


def speed_up(value, low, high, kind="measured"):
    text = f"{value:.2f}x [{low:.2f}, {high}]" if kind != "miss" else "miss (1 of 5)"
    per_seed = [value] * 5
    return {"kind": kind, "value": value, "low": low, "high": high, "per_seed": per_seed, "misses": 1, "text": text}


def arm(name, *techniques, role="candidate", of=None, p=0.001, **costs):
    return {
        "name": name,
        "role": role,
        "of": of,
        "techniques": [{technique: {}} for technique in techniques],
        "args": {},
        "speed_ups": costs,
        "p_value": p if role == "candidate" else None,
        "p_unadjusted": p if role == "candidate" else None,
    }


def record(*arms, tuned="learning rate, 8 trials", placebos=True):
    return {
        "workload": "digits",
        "metric": "eval_loss",
        "cost": "cpu_seconds",
        "tuned": tuned,
        "placebos": placebos,
        "seeds": [1, 2, 3, 4, 5],
        "machine": "a processor, 2 cores",
        "date": "2026-01-31",
        "arms": [arm("baseline", role="baseline"), *arms],
    }


FASTER, EQUAL, SLOWER = speed_up(1.5, 1.2, 1.8), speed_up(1.1, 0.9, 1.3), speed_up(0.8, 0.7, 0.9)
BOUND, MISS = speed_up(1.5, 1.2, None, "bound"), speed_up(0.0, 0.0, None, "miss")


def placebo(found):
    return arm("subset", role="placebo", of="EMA", cpu_seconds=found)


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ([arm("EMA", "EMA", cpu_seconds=FASTER)], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=BOUND)], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=EQUAL)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=SLOWER)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=MISS)], "no gain shown"),
        ([arm("EMA", "EMA")], "no gain shown"),
        ([arm("EMA", "EMA", wall_seconds=FASTER, cpu_seconds=EQUAL)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER, p=0.04)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), placebo(speed_up(1.3, 1.1, 1.45))], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), placebo(speed_up(1.3, 1.1, 1.6))], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), placebo(speed_up(1.1, 1.0, None, "bound"))], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), placebo(MISS)], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), arm("subset", role="placebo", of="EMA")], "no gain shown"),
        ([arm("other", "Muon", cpu_seconds=FASTER), placebo(FASTER)], "reported"),
        ([arm("stack", "EMA", "Muon", cpu_seconds=FASTER)], "reported"),
        ([arm("without", "EMA", role="ablation", of="stack", cpu_seconds=FASTER)], "reported"),
        ([], "reported"),
    ],
)
def test_a_grade_follows_its_rule(arms, expected):
    assert evidence.grade("EMA", {"digits": record(*arms)}) == expected


def test_one_record_with_a_gain_is_enough_but_not_on_an_untuned_baseline():
    gain, none = arm("EMA", "EMA", cpu_seconds=FASTER), arm("EMA", "EMA", cpu_seconds=SLOWER)
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain)}) == "proven here"
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain, tuned="")}) == "no gain shown"
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain, placebos=False)}) == "no gain shown"


def test_who_compares_often_enough_must_find_more():
    gain, none = arm("EMA", "EMA", cpu_seconds=FASTER, p=0.01), arm("EMA", "EMA", cpu_seconds=EQUAL, p=0.2)
    assert evidence.grade("EMA", {"a": record(gain), "b": record(none)}) == "proven here"
    assert evidence.grade("EMA", {"a": record(gain), "b": record(none), "c": record(none)}) == "no gain shown"
    others = {"a": record(gain), "b": record(none), "c": record(none, tuned=""), "d": record(arm("Muon", "Muon"))}
    assert evidence.grade("EMA", others) == "proven here", "only arms of its own on tuned baselines count"


def test_holms_adjustment():
    assert evidence.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 3 x 0.01, 2 x 0.03, 1 x 0.04
    assert evidence.holm([0.9, 0.8]) == [1.0, 1.0] and evidence.holm([]) == []


@pytest.mark.parametrize(
    ("arms", "verdict", "sentence"),
    [
        ([arm("EMA", cpu_seconds=FASTER)], "faster", "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster."),
        ([arm("EMA", cpu_seconds=EQUAL)], "no gain shown", "EMA: no gain shown, 1.10x [0.90, 1.3] at equal loss."),
        ([arm("EMA", cpu_seconds=SLOWER)], "slower", "EMA is slower: 0.80x [0.70, 0.9] at equal loss."),
        (
            [arm("EMA", cpu_seconds=MISS)],
            "miss",
            "EMA: miss. 1 of 5 seeds ended worse than the baseline's shortest run, or failed.",
        ),
        (
            [arm("EMA", cpu_seconds=FASTER), placebo(FASTER)],
            "no gain over its placebo",
            "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster, but a placebo may be as fast (subset): "
            "no gain shown.",
        ),
        (
            [arm("EMA", cpu_seconds=FASTER, p=0.2)],
            "no gain beyond chance",
            "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster, which among so many candidates may be chance "
            "(p = 0.2): no gain shown.",
        ),
        (
            [arm("EMA", cpu_seconds=FASTER), arm("subset", role="placebo", of="EMA")],
            "not all placebos run",
            "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster, but not all of its placebos were run "
            "(not subset): no gain shown.",
        ),
        ([arm("EMA")], "not measured", "EMA: CPU seconds were not measured."),
    ],
)
def test_words_say_what_came_out(arms, verdict, sentence):
    document = record(*arms)
    assert evidence.verdict(document, document["arms"][1]) == verdict
    assert evidence.sentence(document, document["arms"][1]) == sentence


def test_what_was_compared_with_no_placebos_says_so():
    document = record(arm("EMA", cpu_seconds=FASTER), placebos=False)
    assert evidence.verdict(document, document["arms"][1]) == "faster, without placebos"
    assert evidence.sentence(document, document["arms"][1]).endswith(" faster; it was compared with no placebos.")


def test_a_card_has_a_line_for_each_arm_and_the_grade():
    name = "ExponentialMovingAverage"
    own = arm("EMA(half_life=10)", name, cpu_seconds=SLOWER) | {"args": {"learning_rate": 0.1}}
    records = {"digits": record(own, arm("pretrain", "Muon", name, cpu_seconds=FASTER), tuned="")}
    text = cards.card(ExponentialMovingAverage, records)
    assert "- *Evidence*: no gain shown.\n" in text
    assert (
        "## Evidence\n\n"
        "- [digits](../evidence/digits.json), `EMA(half_life=10)` with learning_rate 0.1: **0.80x [0.70, 0.9]** in CPU "
        "seconds at equal loss against a baseline that was not tuned; slower. 5 seeds, a processor, 2 cores, "
        "2026-01-31.\n"
        "- [digits](../evidence/digits.json), within `pretrain` (Muon, ExponentialMovingAverage): "
        "**1.50x [1.20, 1.8]** in CPU seconds at equal loss against a baseline that was not tuned; faster. 5 seeds, "
        "a processor, 2 cores, 2026-01-31.\n\n## References\n"
    ) in text
    assert "## Evidence\n\nNo record yet.\n\n## References\n" in cards.card(ExponentialMovingAverage, {})


@pytest.mark.parametrize(("gained", "grade"), [(True, "proven here"), (False, "no gain shown"), (None, "reported")])
def test_what_a_benchmark_found_is_on_the_card_and_in_the_grade(gained, grade):
    finding = {"technique": "ExponentialMovingAverage", "workload": "digits", "text": "one more", "gained": gained}
    records = {"pairs": record() | {"findings": [finding, finding | {"technique": "Muon"}]}}
    del records["pairs"]["arms"]
    assert evidence.grade("ExponentialMovingAverage", records) == grade
    assert (
        "## Evidence\n\n- [pairs](../evidence/pairs.json), digits: one more. 5 seeds, a processor, 2 cores, "
        "2026-01-31.\n\n## References\n"
    ) in cards.card(ExponentialMovingAverage, records)


def test_only_comparisons_are_records(tmp_path):
    (tmp_path / "overhead.json").write_text('{"what": "step time"}')
    (tmp_path / "digits.json").write_text(json.dumps(record()))
    assert evidence.load_records(tmp_path) == {"digits": record()}
    assert evidence.load_records() == evidence.load_records(evidence.folder())
    assert (evidence.folder() / "overhead.json").exists()
