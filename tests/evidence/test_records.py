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
        "qualities": [1.0] * 5,
        "quality": 1.0,
        "errors": [],
        "speed_ups": costs,
        "p_value": p if role == "candidate" else None,
        "p_unadjusted": p if role == "candidate" else None,
    }


FREE = ("learning_rate", "per_device_train_batch_size", "train_sampling_strategy", "weight_decay", "adam_beta2")
TRIALS = [dict.fromkeys(FREE, 2), *(dict.fromkeys(FREE, 2) | {name: value} for name in FREE for value in (1, 4))]
"""A search of every option that Trainer offers for free; in each, the chosen value is in the middle."""


def record(*arms, tuned="learning rate, 8 trials", trials=TRIALS, **others):
    return {
        "form": evidence.FORM,
        "workload": "digits",
        "metric": "eval_loss",
        "cost": "cpu_seconds",
        "tuned": tuned,
        "trials": {"baseline": trials},
        "baseline_args": dict.fromkeys(FREE, 2),
        "lower_is_better": True,
        "level": None,
        "seeds": [1, 2, 3, 4, 5],
        "machine": "a processor, 2 cores",
        "date": "2026-01-31",
        "arms": [arm("baseline", role="baseline"), *arms],
        **others,
    }


FASTER, EQUAL, SLOWER = speed_up(1.5, 1.2, 1.8), speed_up(1.1, 0.9, 1.3), speed_up(0.8, 0.7, 0.9)
BOUND, MISS = speed_up(1.5, 1.2, None, "bound"), speed_up(0.0, 0.0, None, "miss")


def placebo(found, of="EMA"):
    return arm("subset", role="placebo", of=of, cpu_seconds=found)


HARMLESS = placebo(speed_up(1.0, 0.95, 1.05))


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ([arm("EMA", "EMA", cpu_seconds=FASTER), HARMLESS], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=BOUND), HARMLESS], "proven here"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER), placebo(HARMLESS["speed_ups"], of="other")], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=EQUAL)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=SLOWER)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=MISS)], "no gain shown"),
        ([arm("EMA", "EMA")], "no gain shown"),
        ([arm("EMA", "EMA", wall_seconds=FASTER, cpu_seconds=EQUAL)], "no gain shown"),
        ([arm("EMA", "EMA", cpu_seconds=FASTER, p=0.04), HARMLESS], "no gain shown"),
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
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain, HARMLESS)}) == "proven here"
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain, HARMLESS, tuned="")}) == "no gain shown"
    assert evidence.grade("EMA", {"a": record(none), "b": record(gain)}) == "no gain shown"


@pytest.mark.parametrize("name", FREE)
def test_a_baseline_without_a_free_option_of_trainer_proves_nothing(name):
    gain = arm("EMA", "EMA", cpu_seconds=FASTER)
    narrow = [trial | {name: 2} for trial in TRIALS]
    assert evidence.fair(record(gain, HARMLESS)) and not evidence.fair(record(gain, HARMLESS, trials=narrow))
    assert evidence.grade("EMA", {"a": record(gain, HARMLESS, trials=narrow)}) == "no gain shown"


def test_a_baseline_at_the_border_of_its_search_proves_nothing():
    own = dict.fromkeys(FREE, 2)
    for name, value, fair in (("learning_rate", 1, False), ("learning_rate", 4, False), ("weight_decay", 4, True)):
        document = record(arm("EMA", "EMA", cpu_seconds=FASTER), HARMLESS, baseline_args=own | {name: value})
        assert evidence.fair(document) is fair
    batch = "per_device_train_batch_size"
    assert not evidence.fair(record(baseline_args=own | {batch: 4}))
    assert evidence.fair(record(baseline_args=own | {batch: 1})), "no batch is smaller"


def test_who_compares_often_enough_must_find_more():
    gain, none = arm("EMA", "EMA", cpu_seconds=FASTER, p=0.01), arm("EMA", "EMA", cpu_seconds=EQUAL, p=0.2)
    first = record(gain, HARMLESS)
    assert evidence.grade("EMA", {"a": first, "b": record(none)}) == "proven here"
    assert evidence.grade("EMA", {"a": first, "b": record(none), "c": record(none)}) == "no gain shown"
    others = {"a": first, "b": record(none), "c": record(none, tuned=""), "d": record(arm("Muon", "Muon"))}
    assert evidence.grade("EMA", others) == "proven here", "only arms of its own on fair baselines count"


def test_holms_adjustment():
    assert evidence.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 3 x 0.01, 2 x 0.03, 1 x 0.04
    assert evidence.holm([0.9, 0.8]) == [1.0, 1.0] and evidence.holm([]) == []


@pytest.mark.parametrize(
    ("arms", "verdict", "sentence"),
    [
        (
            [arm("EMA", cpu_seconds=FASTER), HARMLESS],
            "faster",
            "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster.",
        ),
        (
            [arm("EMA", cpu_seconds=FASTER)],
            "without placebos",
            "EMA reaches the baseline's loss 1.50x [1.20, 1.8] faster, but it was compared with no placebos: "
            "no gain shown.",
        ),
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


# Caveats --------------------------------------------------------------------------------------------------------------


def test_a_fair_comparison_of_agreeing_seeds_has_no_caveat():
    assert evidence.caveats(record(arm("EMA", cpu_seconds=FASTER), HARMLESS)) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"form": 1},
            "The record has the older form 1: no trials, and placebos not for each arm. Run the comparison again.",
        ),
        (
            {"trials": [trial | {"weight_decay": 2, "adam_beta2": 2} for trial in TRIALS]},
            "The search of the baseline did not vary weight decay and beta2.",
        ),
        (
            {"baseline_args": {"learning_rate": 4, "per_device_train_batch_size": 1}},
            "The search of the baseline ended at its border in learning rate. Give it more trials.",
        ),
        (
            {"trials": [trial | {"per_device_train_batch_size": 2 * i} for i, trial in enumerate(TRIALS, 1)]},
            "The search of the baseline ended at its border in batch size. Give it more trials.",
        ),
        ({"level": 0.9}, "The baseline never reaches the workload's loss of 0.9: its best is 1."),
        (
            {"level": 1.1, "lower_is_better": False, "metric": "eval_accuracy"},
            "The baseline never reaches the workload's accuracy of 1.1: its best is 1.",
        ),
    ],
)
def test_what_limits_a_record_is_said_in_one_sentence(changes, sentence):
    assert evidence.caveats(record(**changes)) == [sentence]


def test_what_limits_an_arm_is_said_in_one_sentence():
    noisy = arm("noisy", cpu_seconds=speed_up(1.1, 0.7, 1.7) | {"per_seed": [0.6, 1.9, 1.0, 1.2, 1.1]})
    lost = arm("lost", cpu_seconds=MISS) | {"qualities": [1.0, None, 1.0], "errors": ["ValueError: no."]}
    blank = arm("blank", cpu_seconds=MISS) | {"qualities": [None, 1.0]}
    assert evidence.caveats(record(noisy, lost, blank)) == [
        "noisy: its seeds differ by more than its effect, from 0.60x to 1.90x.",
        "lost failed on 1 of 3 seeds: ValueError: no.",
        "blank failed on 1 of 2 seeds, without a finite quality.",
    ]


def test_a_card_has_a_line_for_each_arm_and_the_grade():
    name = "ExponentialMovingAverage"
    own = arm("EMA", cpu_seconds=SLOWER) | {"args": {"learning_rate": 0.1}, "techniques": [{name: {"half_life": 10}}]}
    records = {"digits": record(own, arm("pretrain", "Muon", name, cpu_seconds=FASTER), HARMLESS, tuned="")}
    text = cards.card(ExponentialMovingAverage, records)
    assert "- *Evidence*: no gain shown.\n" in text
    assert (
        "## Evidence\n\n"
        "- [digits](../evidence/digits.json), `ExponentialMovingAverage(half_life=10)` with learning_rate 0.1: "
        "**0.80x [0.70, 0.9]** in CPU "
        "seconds at equal loss against a baseline that was not tuned; slower. 5 seeds, a processor, 2 cores, "
        "2026-01-31.\n"
        "- [digits](../evidence/digits.json), within `pretrain` (Muon, ExponentialMovingAverage): "
        "**1.50x [1.20, 1.8]** in CPU seconds at equal loss against a baseline that was not tuned; without placebos. "
        "5 seeds, a processor, 2 cores, 2026-01-31.\n\n## References\n"
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
