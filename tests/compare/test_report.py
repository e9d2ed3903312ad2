from __future__ import annotations

import copy
import html
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from hf_accel import evidence
from hf_accel.compare import Arm, Comparison, write_record
from hf_accel.compare.figures import ARMS as ARM_COLORS
from hf_accel.compare.figures import COLORS, PARTS, parts
from hf_accel.compare.page import page
from hf_accel.compare.report import markdown, sentences, table
from hf_accel.compare.results import record
from hf_accel.recipe import Recipe

ARMS = {  # name: (loss at the cost of the full horizon, that cost), the baseline reaches 1.3 there at cost 10
    "half": (1.3, 5.0),
    "same": (1.3, 10.0),
    "bad": (3.0, 10.0),
    "stack & more": (1.3, 6.0),
    "stack & more without Muon": (1.3, 8.0),
    "baseline, LR of half": (1.3, 9.0),
    "Trainer's defaults": (1.8, 10.0),
}
START = {"learning_rate": 1.0, "per_device_train_batch_size": 8, "train_sampling_strategy": "random"}
START |= {"weight_decay": 0.0, "adam_beta2": 0.999, "loss": 1.3, "cost": 10.0}
OTHERS = {"learning_rate": 2.0, "per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
OTHERS |= {"weight_decay": 0.1, "adam_beta2": 0.98}
TRIALS = {"baseline": [START, *(START | {name: value} for name, value in OTHERS.items())]}
TRIALS["baseline"].append(START | {"per_device_train_batch_size": 16})


@pytest.fixture(scope="module")
def results():
    """A comparison whose answers are known: the baseline's loss is 1 + 0.3 / horizon, its cost 10 x horizon."""
    comparison = Comparison(
        [
            Arm("half", Recipe(techniques=["LayerFreezing"])),
            Arm("same", Recipe(techniques=["GradientSpikeGuard"])),
            Arm("bad", Recipe(techniques=["Muon"])),
            Arm("stack & more", Recipe(techniques=["Muon", "LayerFreezing"])),
        ],
        workload="synthetic",
        seeds=3,
        cost="cpu_seconds",
    )
    without = Arm("stack & more without Muon", Recipe(techniques=["LayerFreezing"]), "ablation", "stack & more")
    placebo = Arm("baseline, LR of half", Recipe(args={"learning_rate": 1.0}), "placebo", "half")
    defaults = Arm("Trainer's defaults", Recipe(), "defaults")
    comparison.trials = TRIALS
    arms = [comparison.reference, *comparison.arms, without, placebo, defaults]
    noise, records = random.Random(0), {}
    for arm in arms:
        for seed in comparison.seeds:
            for horizon in comparison.horizons if arm.role in ("baseline", "defaults") else [1.0]:
                loss, cost = ARMS.get(arm.name, (1 + 0.3 / horizon, 10 * horizon))
                if arm.role == "defaults":
                    loss, cost = 1 + 0.8 / horizon, 10 * horizon
                record = made(loss + noise.gauss(0, 0.004), cost * math.exp(noise.gauss(0, 0.01)))
                records[arm.name, horizon, seed] = {"run": {"recipe": arm.recipe.to_dict(), "options": {}}, **record}
    for (name, _, _), record in records.items():
        record["phases"] = {} if name == "baseline" else record["phases"]
    records["baseline, hosted", 1.0, 1] = {"run": {}, **made(1.3, 10.0)}
    records["bad", 1.0, 2] = {"run": {}, "status": "failed", "error": "ValueError: <no> & never"}
    return comparison.collect(arms, records)


def made(loss: float, cost: float) -> dict:
    costs = {"cpu_seconds": cost, "wall_seconds": cost, "flops": 1e9, "tokens": 0.0, "samples": 64.0, "steps": 8.0}
    return {
        "status": "finished",
        "metrics": {"eval_loss": loss, "epoch": 1.0},
        "costs": costs,
        "uncharged": {},
        "set_up": {"cpu_seconds": 0.1, "wall_seconds": 0.1},
        "peak_memory_bytes": 2**28,
        "phases": {"data": 0.1, "forward": cost / 3, "backward": cost / 2, "optimizer": 0.5, "1.Muon": 0.2, "other": 1},
        "techniques": [],
        "log": [[step, 2 + loss / step] for step in range(1, 9)],
        "whole_seconds": cost + 1,
    }


# Words ----------------------------------------------------------------------------------------------------------------


def test_a_sentence_says_what_came_out(results):
    half, same, bad, stack = sentences(results)
    assert re.fullmatch(r"half reaches the baseline's loss (1\.9\d|2\.0\d)x \[\d\.\d\d, \d\.\d\d\] faster\.", half)
    assert re.fullmatch(r"same: no gain shown, [01]\.\d\dx \[.*\] at equal loss\.", same)
    assert bad == "bad: miss. 3 of 3 seeds ended worse than the baseline's shortest run, or failed."
    assert "1.6" in stack and stack.startswith("stack & more reaches")


def test_there_are_two_speed_ups_and_one_claim(results):
    half, bad = results.row("half"), results.row("bad")
    assert half.over_defaults.kind == "bound", "1.5 times the horizon does not bring the defaults to its loss"
    assert half.over_defaults.value == pytest.approx(15 / 5, rel=0.05)
    assert bad.over_defaults.kind == "miss" and results.row("baseline").over_defaults is None
    narrow = copy.copy(results)
    narrow.trials = {}
    for found, claim in ((results, "over the best of Trainer"), (narrow, "over the baseline")):
        for text in (markdown(found), page(found), shown(found)):
            words = html.unescape(" ".join(text.split()))
            assert "over Trainer" in words and claim in words and str(half.over_defaults) in words
            assert ("did not vary learning rate, batch size, grouping by length" in words) is (found is narrow)
    assert record(results)["arms"][5]["over_defaults"]["text"] == str(half.over_defaults)


def shown(results) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(results))
    return console.export_text()


def test_the_markdown_begins_with_the_sentences(results):
    text = markdown(results)
    lines = text.splitlines()
    assert lines[2:6] == [f"- {line}" for line in sentences(results)]
    trials = lines[lines.index("## Trials") + 2 :]
    assert trials[0].startswith("| arm | learning_rate | per_device_train_batch_size | train_sampling_strategy |")
    assert trials[2] == "| baseline | 1 | 8 | random | 0 | 0.999 | 1.3 | 10 |"
    assert trials[3].startswith("| baseline | 2 |") and len(trials) > 2 + len(TRIALS["baseline"])
    assert all(any(line.startswith(f"| {name} ") or f"- {name} |" in line for line in lines) for name in ARMS)
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == [
        "## Apart from the comparison",
        "## Counted in other costs",
        "## Trials",
        "## Caveats",
        "## Baseline",
    ]


def recollected(results, change, cost="cpu_seconds"):
    """The same comparison with some records changed, or left out where the change is None."""
    comparison = Comparison(
        [Arm("half", Recipe(techniques=["LayerFreezing"]))], workload="synthetic", seeds=3, cost=cost
    )
    placebo = Arm("baseline, LR of half", Recipe(args={"learning_rate": 1.0}), "placebo", "half")
    keys = ("arm", "horizon", "seed")
    records = {tuple(run[key] for key in keys): change(copy.deepcopy(run)) for run in results.runs}
    records = {key: record for key, record in records.items() if record is not None}
    return comparison.collect([comparison.reference, *comparison.arms, placebo], records)


def test_a_placebo_that_the_time_did_not_allow_is_missed(results):
    assert recollected(results, lambda run: run).complete
    cut = recollected(results, lambda run: None if run["arm"] == "baseline, LR of half" else run)
    assert not cut.complete and cut.row("baseline, LR of half").seeds == []
    document = record(cut)
    assert evidence.verdict(document, document["arms"][5]) == "not all placebos run"
    assert "not all of its placebos were run (not baseline, LR of half)" in sentences(cut)[0]
    for text in (markdown(cut), page(cut)):
        assert "Not all runs were made" in text and "baseline, LR of half" in text


def test_a_cost_that_was_not_counted_is_left_out_and_no_miss(results):
    def uncounted(run):
        if run["arm"] == "half" and run["seed"] == 2:
            run["costs"]["flops"] = math.nan
        return run

    found = recollected(results, uncounted).row("half").speed_ups
    assert "flops" not in found and found["cpu_seconds"].kind == "measured"
    known = recollected(results, lambda run: run).row("half").speed_ups
    assert "flops" in known
    told = sentences(recollected(results, uncounted, cost="flops"))
    assert told == ["half: FLOPs were not measured."]


def test_a_baseline_that_fails_on_one_seed_is_a_caveat_and_keeps_the_rest(results):
    def failing(run):
        lost = (run["arm"], run["horizon"], run["seed"]) == ("baseline", 0.75, 2)
        return {"run": {}, "status": "failed", "error": "The process ended with status 137."} if lost else run

    found = recollected(results, failing)
    assert found.row("half").speed_ups["cpu_seconds"].kind == "measured"
    assert found.row("half").speed_ups["cpu_seconds"].value == pytest.approx(2.0, rel=0.05)
    for text in (markdown(found), page(found), shown(found)):
        assert "baseline failed on 1 of 3 seeds: The process ended with status 137." in text


# The page -------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """What a page is made of; raises where it is not nested as it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.text, self.headings = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",) and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.text += data


def test_the_page_needs_nothing_else_and_shows_every_arm(results):
    text = page(results)
    elements = Elements(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements.seen}
    ids = {f"#{attrs['id']}" for _, attrs in elements.seen if "id" in attrs}
    assert {attrs["href"] for _, attrs in elements.seen if "href" in attrs} <= ids, "marks of the page itself"
    assert not [attrs for _, attrs in elements.seen if {"src", "xlink:href"} & attrs.keys()]
    assert "url(" not in text and "@import" not in text and "http" not in text
    for name in ["baseline", *ARMS]:
        assert elements.text.count(name) >= 2, name
    for sentence in sentences(results):
        assert sentence in elements.text
    assert "ValueError: <no> & never" in elements.text
    assert elements.headings == [
        "Quality against cost",
        "Speed-up at equal quality",
        "Ablation",
        "Training loss",
        "Where the time went",
        "Counted in other costs",
        "Trials",
        "Apart from the comparison",
        "Caveats",
        "Baseline",
        "Machine and versions",
    ]


def test_its_charts_are_well_formed_and_have_every_run(results):
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page(results), re.DOTALL)]
    quality = next(svg for svg in pictures if svg.get("aria-label") == "quality of every run against its cost")
    titles = [title.text for title in quality.iter("title")]
    finished = [run for run in results.runs if run["status"] == "finished"]
    finished = [run for run in finished if run["arm"] != "baseline, hosted"]
    assert len(titles) == len(finished) == 2 * 5 * 3 + 6 * 3 - 1
    for run in finished:
        label = f"{run['arm']}, horizon {run['horizon']:g}, seed {run['seed']}: loss {run['metrics']['eval_loss']:.4f}"
        assert len([title for title in titles if title.startswith(label + " at ")]) == 1
    marks = [mark for group in quality.iter("g") if group.find("title") is not None for mark in group.iter("use")]
    assert len(marks) == len(titles)
    left, top, width, height = (float(part) for part in quality.get("viewBox").split())
    for mark in marks:
        assert left <= float(mark.get("x")) <= left + width and top <= float(mark.get("y")) <= top + height


def test_costs_grow_to_the_right_and_losses_upwards(results):
    text = page(results)
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    quality = next(svg for svg in pictures if svg.get("aria-label") == "quality of every run against its cost")
    places = {
        group.find("title").text.partition(":")[0]: [float(group.find(".//use").get(axis)) for axis in "xy"]
        for group in quality.iter("g")
        if group.find("title") is not None
    }
    for seed in results.seeds:
        short, long = (places[f"baseline, horizon {horizon}, seed {seed}"] for horizon in ("0.25", "1.5"))
        half = places[f"half, horizon 1, seed {seed}"]
        assert short[0] < half[0] < long[0], "cheaper is further left"
        assert short[1] < half[1] < long[1], "a higher loss is higher up"
    assert "5 runs lie outside and are drawn at the edge" in text
    bars = next(svg for svg in pictures if svg.get("aria-label") == "wall seconds of each arm by part")
    told = [title.text for title in bars.iter("title")]
    assert "forward: 3.33 s, 32.9%" in told, "of the baseline through AccelTrainer"
    assert len([title for title in told if title.startswith("techniques: 0.20 s")]) == 7


def test_colors_follow_the_style_sheet(results):
    text = page(results)
    declared = set(re.findall(r"(--\w+): #", text))
    assert {f"--{name}" for name in (COLORS | ARM_COLORS)} <= declared
    assert {f"--{name}" for name in re.findall(r"var\(--(\w+)\)", text)} <= declared
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert {*re.findall("#[0-9a-f]{6}", "".join(pictures))} <= {*PARTS.values()}, "and no other color is fixed"


def test_the_ablation_is_the_ratio_seed_by_seed(results):
    text = Elements(page(results)).text
    (found,) = re.findall(r"what it adds.*?x \[[^]]*\].*?x \[[^]]*\](\d\.\d\d)x \[", text.replace("\n", ""))
    assert float(found) == pytest.approx(8 / 6, abs=0.05)


def test_a_comparison_that_measured_little_has_a_page(results):
    bare = collect_without(results, phases={}, log=[])
    headings = Elements(page(bare)).headings
    assert "Training loss" not in headings and "Where the time went" not in headings and "Baseline" in headings


def collect_without(results, **changes):
    bare = copy.copy(results)
    bare.runs = [run | changes for run in results.runs]
    return bare


def test_phases_are_joined():
    found = parts({"data": 1.0, "saving": 2.0, "other": 4.0, "0.Muon": 8.0, "1.InfoBatch": 16.0})
    nothing = {"forward": 0, "backward": 0, "optimizer": 0, "evaluation": 0}
    assert found == nothing | {"data": 1, "techniques": 24, "other": 6}


# Records --------------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(results, tmp_path):
    write_record(results, tmp_path / "new" / "synthetic.json")
    (tmp_path / "new" / "other.json").write_text('{"what": "no comparison"}')
    read = evidence.load_records(tmp_path / "new")
    assert read == {"synthetic": record(results)}
    document = read["synthetic"]
    assert "runs" not in document and "log" not in json.dumps(document)
    arms = {arm["name"]: arm for arm in document["arms"] if arm["role"] != "baseline"}
    assert arms.keys() == ARMS.keys()
    assert arms["half"]["speed_ups"]["cpu_seconds"]["text"] == str(results.row("half").speed_ups["cpu_seconds"])
    assert arms["half"]["paid"] == pytest.approx([5.0] * 3, rel=0.05)
    assert arms["bad"]["qualities"][1] is None and arms["bad"]["qualities"][0] == pytest.approx(3.0, rel=0.01)
    assert arms["baseline, LR of half"]["args"] == {"learning_rate": 1.0}
    assert evidence.grade("LayerFreezing", read) == "proven here"
    assert evidence.grade("GradientSpikeGuard", read) == "no gain shown" == evidence.grade("Muon", read)
