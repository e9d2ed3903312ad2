"""Techniques together: all pairs, in both orders, within few runs; two owners of a slot are refused.

``pytest tests/contract/test_composition.py --write-docs`` writes docs/composition.md from what passed.
"""

import datetime
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
import transformers

from hf_accel.recipe import known_techniques
from hf_accel.technique import SLOTS
from hf_accel.testing import EPOCHS, covering_array, largest_difference, losses_of, tiny_trainer, weights_of

TABLE = Path(__file__).parents[2] / "docs" / "composition.md"
KINDS = {name: kind for name, kind in known_techniques().items() if kind.modality == "text"}
OTHERS = {
    modality: [name for name, kind in known_techniques().items() if kind.modality == modality]
    for modality in ("masked text", "replaced text", "image", "speech")
}
OWNERS = {slot: [name for name, kind in KINDS.items() if slot in kind.implemented_hooks()] for slot in SLOTS}
# No slots: one does away with what the other reads; each replaces the layers; each says what the weights are, or were.
OWNERS["logits"] = ["ChunkedCrossEntropy", "Distillation"]
OWNERS["layers"] = ["Float8Training", "Int8Training", "LowRankTraining"]
OWNERS["first values"] = ["DepthScaledInit", "ExpandFrom", "MuParametrization", "ShrinkFrom", "ZeroInitResidual"]
OWNERS["whole model"] = ["ExpandFrom", "LoRA", "MuParametrization", "ShrinkFrom"]
OWNERS["weights"] = ["LoRA", "LowRankTraining", "ProgressiveStacking", "SparseTraining"]
OWNERS["averages"] = ["ExponentialMovingAverage", "LatestWeightAveraging", "Lookahead", "ProgressiveStacking"]
OWNERS["outer weights"] = ["DiLoCo", "GradientCompression", "LocalSGD", "ProgressiveStacking"]
OWNERS["lost blocks"] = ["ExpandFrom", "ProgressiveStacking", "ShrinkFrom"]
OWNERS["frozen blocks"] = ["LayerFreezing", "ProgressiveStacking"]
OWNERS["places of blocks"] = ["ProgressiveStacking", "RandomTokenDrop"]
OWNERS["mean weights"] = ["DiLoCo", "LocalSGD", "LowRankTraining", "SparseTraining"]
OWNERS["slow weights"] = ["Lookahead", "LowRankTraining"]
RULES = {
    "logits": "reads the logits, which are not there. Leave one",
    "layers": "no plain nn.Linear|no trainable linear layer",
    "first values": "gives the model its first values, too. Keep one",
    "whole model": "adapters are trained and saved without the model|the axes of its parameters are known for",
    "weights": "Leave one out|no trainable linear layer",
    "averages": "from before the last growth. Leave one of the two out",
    "outer weights": "of before a growth. Leave one out",
    "lost blocks": "to blocks that would be lost. Leave one out",
    "frozen blocks": "by their places, and copies are elsewhere. Leave one out",
    "mean weights": "of which there is no mean. Leave one of the two out",
    "slow weights": "know nothing of the products before they begin. Leave one of the two out",
    "places of blocks": "by their places, and copies are elsewhere. Leave one out",
}
FREE = [name for name in KINDS if not any(name in owners for owners in OWNERS.values())]
RUNS = covering_array(OWNERS, FREE)
SLOT_OF_CLASH = {frozenset(pair): slot for slot, owners in reversed(OWNERS.items()) for pair in combinations(owners, 2)}
CLASHES = sorted(tuple(sorted(pair)) for pair in SLOT_OF_CLASH)
PAIRS = [pair for pair in permutations(KINDS, 2) if frozenset(pair) not in SLOT_OF_CLASH]


def build(names):
    """Fresh techniques with their defaults; budgets of which a search leaves the length of the other runs, for effects
    take time."""
    kinds = [known_techniques()[name] for name in names]
    techniques = [kind(**kind.probe_fields) for kind in kinds]
    searched = 21 if "LearningRateSearch" in names else 0
    values = {"Budget": {"limit": f"{EPOCHS + searched}epochs"}}
    if "Budget" in names and searched:
        values["LearningRateSearch"] = {"share": searched / (EPOCHS + searched)}
    if {"LoRA", "DiLoCo"} & set(names):
        values["GradientSpikeGuard"] = {
            "max_ratio": 1e6
        }  # gradients of adapters grow from zero, and momentum of 0.9 overshoots
    return [replace(t, **values.get(type(t).__name__, {})) for t in techniques]


def train(names, directory, resume=None, **args):
    """A finished run, and the examples and tokens that its model was trained on, counted at the model's door."""
    trainer = tiny_trainer(build(names), directory, **args)
    seen, passed = Counter(), {}

    def count(module, positional, inputs):
        if module.training and torch.is_grad_enabled():
            main, step = inputs[module.main_input_name], trainer.state.global_step
            if passed.get(id(main), (main, -1))[1] == step:
                return  # a second pass of the same step, as `SharpnessAware` makes, spends no further example
            passed[id(main)] = main, step
            seen["samples"] += int((inputs["position_ids"] == 0).sum()) if "position_ids" in inputs else len(main)
            if not main.is_floating_point():
                real = main != 0 if "Packing" in names else torch.ones_like(main)
                seen["tokens"] += int(inputs.get("attention_mask", real).sum())

    handle = trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train(resume_from_checkpoint=resume)
    handle.remove()
    return trainer, seen


def check_together(names, directory):
    """Every member has its own effect, the books are right, and a resume from the middle is bit-identical."""
    straight, seen = train(names, directory / "straight", save_strategy="steps", save_steps=1)
    receipt, spent = straight.receipt, straight.clock.spent
    whole = len(straight.train_dataset) if straight.stream is None else len(straight.stream.dataset)
    if whole == len(straight.train_dataset):  # of few examples, the next technique may find nothing to leave out
        for technique, entry in zip(straight.techniques, receipt.techniques, strict=True):
            assert technique.took_effect(entry["report"]), f"no effect of {entry}"
    assert all(math.isfinite(loss) for loss in losses_of(straight))
    assert (receipt.samples, receipt.tokens) == (seen["samples"], seen["tokens"])
    assert receipt.steps + receipt.skipped_steps == straight.state.global_step == len(losses_of(straight))
    assert straight.clock.progress == 1.0
    assert straight.state.epoch == spent["epochs"] == EPOCHS
    assert receipt.final_learning_rate == 0.0

    middle = straight.state.global_step // 2 + 1
    checkpoint = str(directory / "straight" / f"checkpoint-{middle}")
    resumed, _ = train(names, directory / "resumed", resume=checkpoint)
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    assert (resumed.receipt.samples, resumed.receipt.tokens) == (receipt.samples, receipt.tokens)
    assert [t["report"] for t in resumed.receipt.techniques] == [t["report"] for t in receipt.techniques]


@pytest.fixture(scope="module")
def passed(request):
    """The runs that passed; written down as a table where this was asked for."""
    runs = []
    yield runs
    if request.config.getoption("write_docs"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(runs))


def table(runs):
    """Technique by technique: in how many of the runs that passed the two met, or the slot in which they clash."""
    met = Counter(frozenset(pair) for names in runs for pair in combinations(names, 2))
    names = list(KINDS)
    lines = [
        "# Composition",
        "",
        f"{datetime.date.today()}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"{len(runs)} runs of up to {max(map(len, runs), default=0)} techniques.",
        "",
        "A number says in how many runs the two were together and passed: every member shows its own effect; samples,",
        "tokens and epochs are counted right; the learning rate ends at 0; a resume from the middle is bit-identical.",
        "A name says which slot both own, or what one does away with and the other reads: the list is refused before",
        "the first step.",
        "",
        "Written by `pytest tests/contract/test_composition.py --write-docs`; with `-m full` from each pair alone, in",
        "both orders.",
        "",
        "The model is one of text. Techniques for other data are not in the table; those for one kind of data were run",
        "together, in both orders: "
        + "; ".join(f"{modality}: {', '.join(sorted(others))}" for modality, others in OTHERS.items() if others)
        + ".",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for a in names:
        cells = []
        for b in names:
            pair = frozenset((a, b))
            clash = f"clash: `{SLOT_OF_CLASH[pair]}`" if pair in SLOT_OF_CLASH else None
            cells.append("" if a == b else clash or str(met[pair]))
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_array_covers_all_pairs():
    before = {pair for names in RUNS for pair in combinations(names, 2)}
    assert before == set(PAIRS)
    for a, b in permutations(KINDS, 2):
        assert any(a in names and b not in names for names in RUNS)


def test_the_array_gives_each_slot_one_owner():
    owners = {"order": ["a", "b", "c"], "batch": ["c", "d"]}
    runs = covering_array(owners, ["e", "f"], seed=3)
    for names in runs:
        assert len(set(names)) == len(names)
        assert all(len(set(names) & set(several)) <= 1 for several in owners.values())
    assert {frozenset(pair) for names in runs for pair in combinations(names, 2)} == {
        frozenset(pair) for pair in combinations("abcdef", 2) if set(pair) not in ({*"ab"}, {*"ac"}, {*"bc"}, {*"cd"})
    }


@pytest.mark.parametrize("names", RUNS, ids=lambda names: f"{len(names)} techniques")
def test_together(names, passed, tmp_path):
    check_together(names, tmp_path)
    passed.append(names)


@pytest.mark.parametrize("modality", [modality for modality, names in OTHERS.items() if names])
def test_together_on_other_data(modality, tmp_path):
    for i, names in enumerate((OTHERS[modality], OTHERS[modality][::-1])):
        check_together(names, tmp_path / str(i))


@pytest.mark.full
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_pair(names, passed, tmp_path):
    check_together(names, tmp_path)
    passed.append(names)


@pytest.mark.parametrize("names", CLASHES, ids="-".join)
def test_two_owners_of_a_slot_are_refused(names, tmp_path):
    for order in (names, names[::-1]):
        first, second = build(order)
        slot = SLOT_OF_CLASH[frozenset(names)]
        with pytest.raises(ValueError) as caught:
            trainer = tiny_trainer([first, second], tmp_path)
            if slot not in SLOTS:
                trainer.train()
        rule = f"{first!r} and {second!r} both own the slot {slot!r}. Keep one."
        assert rule in str(caught.value) if slot in SLOTS else re.search(RULES[slot], str(caught.value))


def test_the_table_is_current(request):
    if request.config.getoption("write_docs"):
        pytest.skip("it is being written")
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    header, *body = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    assert set(header[1:]) == {row[0] for row in body} == set(KINDS)
    for row in body:
        for name, cell in zip(header[1:], row[1:], strict=True):
            slot = SLOT_OF_CLASH.get(frozenset((row[0], name)))
            assert cell == f"clash: `{slot}`" if slot else name == row[0] or int(cell) > 0
