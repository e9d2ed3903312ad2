"""Techniques together: all pairs within few runs; two owners of a slot are refused.

The runs are those of composition_runs.json; ``PYTHONPATH=tests python tests/contract/test_composition.py`` writes it:

- ``together``: every pair meets; the first dozen are in the default suite;
- ``in order``: in both orders where these can differ, and each technique without each other;
- ``both orders``: in both orders throughout, for the full suite;
- ``search``: every technique meets LearningRateSearch, which takes most of the time of a run, and is in no other.

``pytest tests/contract -m "composition and not full" --write-docs`` writes docs/composition.md from what passed.
"""

import datetime
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
import transformers
from contract.covering import covering_array, relations_shown

from hf_accel.recipe import known_techniques
from hf_accel.technique import CLAIMS, SLOTS, Technique
from hf_accel.testing import (
    EPOCHS,
    largest_difference,
    losses_of,
    tiny_trainer,
    weights_of,
)

pytestmark = pytest.mark.composition

FILE = Path(__file__).with_name("composition_runs.json")
TABLE = Path(__file__).parents[2] / "docs" / "composition.md"
KINDS = {name: kind for name, kind in known_techniques().items() if kind.modality == "text"}
OTHERS = {
    modality: [name for name, kind in known_techniques().items() if kind.modality == modality]
    for modality in ("masked text", "replaced text", "image", "speech")
}
OWNERS = {slot: [name for name, kind in KINDS.items() if slot in kind.implemented_hooks()] for slot in SLOTS}
CLAIMED = {claim: [name for name, kind in KINDS.items() if claim in kind.claims] for claim in CLAIMS}
OWNERS |= {claim: names for claim, names in CLAIMED.items() if names}
FREE = [name for name in KINDS if not any(name in owners for owners in OWNERS.values())]
RUNS = json.loads(FILE.read_text()) if FILE.exists() else {}
SEARCH = "LearningRateSearch"
IN_TURN = (
    "prepare_args prepare_dataset prepare_model loss_head transform_batch for_inference "
    "on_step_begin on_pre_optimizer_step on_optimizer_step on_step_end"
).split()
"""Hooks and events in which one technique gets what another has made, or finds the model as the other left it."""
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
        'Written by `pytest tests/contract -m "composition and not full" --write-docs`; with',
        "`-m composition` from each pair alone, too, in both orders.",
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


def order_can_matter(a, b):
    return any(
        getattr(KINDS[a], name) is not getattr(Technique, name) is not getattr(KINDS[b], name) for name in IN_TURN
    )


def relations(kind):
    """What the runs of one kind, with those before it, must show of an ordered pair."""

    def of_a_pair(a, b):
        if kind == "search":
            return ["with"] if SEARCH in (a, b) else []
        if SEARCH in (a, b):
            return []
        if kind == "together":
            return ["with"]
        if kind == "in order":
            return ["with", "without"] + ["before"] * order_can_matter(a, b)
        return ["before", "without"]

    return of_a_pair


def without_search():
    """The slots' owners and the free techniques that arrays are made of; the search is in its own runs only."""
    owners = {slot: [name for name in names if name != SEARCH] for slot, names in OWNERS.items()}
    return owners, [name for name in FREE if name != SEARCH]


def write_runs():
    runs, before = {}, []
    for kind in ("together", "in order", "both orders"):
        runs[kind] = covering_array(*without_search(), relations=relations(kind), given=before)
        before += runs[kind]
    runs["search"] = covering_array(OWNERS, FREE, relations=relations("search"))
    lists = (f'"{kind}": [\n' + ",\n".join(map(json.dumps, lists)) + "\n]" for kind, lists in runs.items())
    FILE.write_text("{\n" + ",\n".join(lists) + "\n}\n")


@pytest.mark.parametrize(
    "kinds", [["together"], ["together", "in order"], ["together", "in order", "both orders"], ["search"]], ids="+".join
)
def test_the_runs_cover_all_pairs(kinds):
    of_a_pair = relations(kinds[-1])
    needed = {
        (a, relation, b)
        for a, b in permutations(KINDS, 2)
        for relation in of_a_pair(a, b)
        if relation == "without" or frozenset((a, b)) not in SLOT_OF_CLASH
    }
    runs = [names for kind in kinds for names in RUNS[kind]]
    assert needed
    assert not needed - relations_shown(runs, KINDS), f"Run python {Path(__file__).name}."
    for names in runs:
        assert set(names) <= set(KINDS) and not any(frozenset(p) in SLOT_OF_CLASH for p in combinations(names, 2))
        assert (SEARCH in names) == (kinds == ["search"])


DEFAULT = {"together": 12, "search": 1}
"""How many runs are in the default suite."""


def runs_with_marks():
    for kind, runs in RUNS.items():
        for i, names in enumerate(runs):
            left_out = pytest.mark.ci if kind in ("together", "in order") else pytest.mark.full
            yield pytest.param(names, id=f"{kind} {i + 1}", marks=[left_out] * (i >= DEFAULT.get(kind, 0)))


def test_every_technique_is_in_the_default_suite():
    assert {name for kind, number in DEFAULT.items() for names in RUNS[kind][:number] for name in names} == set(KINDS)


@pytest.mark.parametrize("names", [*runs_with_marks()])
def test_together(names, passed, tmp_path):
    check_together(names, tmp_path)
    passed.append(names)


@pytest.mark.parametrize("step", [1, pytest.param(-1, marks=pytest.mark.ci)], ids=["in order", "reversed"])
@pytest.mark.parametrize("modality", [modality for modality, names in OTHERS.items() if names])
def test_together_on_other_data(modality, step, tmp_path):
    check_together(OTHERS[modality][::step], tmp_path)


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
            tiny_trainer([first, second], tmp_path)
        slot_rule = f"{first!r} and {second!r} both own the slot {slot!r}. Keep one."
        claim_rule = f"{first!r} and {second!r} both claim {CLAIMS.get(slot)}. Remove one of the two."
        assert (slot_rule if slot in SLOTS else claim_rule) in str(caught.value)


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


if __name__ == "__main__":
    write_runs()
