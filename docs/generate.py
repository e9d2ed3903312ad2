"""Write the cards and the tables of techniques from the code and from ``docs/evidence/*.json``.

    python docs/generate.py

``docs/techniques/<stem>.md`` is the card of ``hf_accel/**/<stem>.py``.  ``docs/techniques.md`` is the index; its column
"what it saves" is written by hand.  In the README, the text between markers is replaced.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

from hf_accel import evidence
from hf_accel.clock import parse_budget
from hf_accel.evidence import Arm, Record, Records
from hf_accel.evidence.cards import FIDELITY, NOTE, area, card, in_order, owned, source, table, trained_with
from hf_accel.recipe import write_technique
from hf_accel.technique import Technique

ROOT = Path(__file__).parents[1]
NOT_ON_FSDP2 = {
    "image": "accelerate asks the model for token embeddings, which ConvNeXt lacks",
    "masked text": "FSDP2 does not support tied biases, and BERT's head has one",
}
"""Modalities with probes that FSDP2 cannot train, and the reasons."""

TASKS = {
    "banking77": "classification of short texts",
    "code-lm": "language model of code, from scratch",
    "gsm8k-lora": "fine-tuning with LoRA",
    "gsm8k-sft": "fine-tuning of a language model",
    "novels-lm": "language model of novels, from scratch",
    "sst2": "classification of phrases",
}
"""Descriptions of workloads in the README's first table."""
BEST = 4
"""Number of rows in that table."""


def main() -> None:
    """Write every generated document, and remove the cards of deleted techniques."""
    written = documents()
    for path in (ROOT / "docs" / "techniques").glob("*.md"):
        if path not in written:
            path.unlink()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def documents() -> dict[Path, str]:
    """Return the text of each generated document."""
    records, found = evidence.load_records(), evidence.folder()
    docs = {card_path(kind): card(kind, records) for _, kind in in_order()}
    overview = ROOT / "docs" / "techniques.md"
    docs[overview] = index(overview.read_text(), records)
    docs[ROOT / "docs" / "sharding.md"] = sharding()
    decayed = {name: document for name, document in records.items() if not constant_rate(document)}
    constant = {name: document for name, document in records.items() if constant_rate(document)}
    text = (ROOT / "README.md").read_text()
    for name, content in {
        "headline": headline(records, found / "overhead.json", found / "budget-kept.json"),
        "results": results_table(decayed),
        "constant": results_table(constant),
        "kept": kept_table(found / "budget-kept.json"),
        "budgets": budgets_table(found / "budget.json"),
        "techniques": techniques_list(records),
    }.items():
        text = renewed(text, name, content)
    docs[ROOT / "README.md"] = text
    return docs


def card_path(kind: type[Technique]) -> Path:
    """Return the path of a technique's card."""
    return ROOT / "docs" / "techniques" / f"{source(kind).stem}.md"


def index(text: str, records: Records) -> str:
    """Write the table of all techniques, with the column "what it saves" of the old text."""
    saves = dict(re.findall(r"^\| \[(\w+)\]\([^)]*\) \| \w+ \| ([^|]*) \|", text, re.MULTILINE))
    rows = []
    for name, kind in in_order():
        if name not in saves:
            raise ValueError(
                f"docs/techniques.md: the table does not say what {name} saves. "
                f"Add a row: | [{name}](techniques/{source(kind).stem}.md) | {area(kind)} | what it saves |"
            )
        slots = ", ".join(f"`{slot}`" for slot in owned(kind)) or "-"
        link = f"[{name}](techniques/{source(kind).stem}.md)"
        rows.append((link, area(kind), saves[name], slots, kind.fidelity, evidence.grade(name, records)))
    parts = [
        "# Techniques",
        "<!-- Written by docs/generate.py from the code, except the column 'what it saves'. -->",
        "At most one technique owns a slot; techniques without slots compose freely. *Fidelity*: "
        + "; ".join(f"`{name}`: {words}" for name, words in FIDELITY.items())
        + ". *Evidence*: `reported` means by others only; `proven here` and `no gain shown` rest on records in "
        "[evidence](evidence). Each card has the figures.",
        table(("technique", "perspective", "what it saves", "slot", "fidelity", "evidence"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def sharding() -> str:
    """Write the table of techniques on several ranks from the declarations of their classes."""
    rows = []
    for name, kind in in_order():
        cells = [kind.refused_backends.get(backend) for backend in ("ddp", "fsdp2", "zero")]
        words = ["works" if reason is None else f"refused: {reason}" for reason in cells]
        if kind.refused_backends.get("fsdp2") is None and kind.modality in NOT_ON_FSDP2:
            words[1] = f"not tested: {NOT_ON_FSDP2[kind.modality]}"
        rows.append((f"[{name}](techniques/{source(kind).stem}.md)", *words))
    parts = [
        "# Techniques on several ranks",
        NOTE,
        "*Works*: two ranks end with the weights of one process (up to rounding) and stay in step with each other. A "
        "resumed run equals the uninterrupted one bit for bit. *Refused*: the trainer raises an error before the first "
        "step. Each cell is a test (`tests/distributed/test_contract.py`, on CPUs with gloo; ZeRO stages 2 and 3).",
        table(("technique", "DDP", "FSDP2", "ZeRO"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def renewed(text: str, name: str, content: str) -> str:
    """Replace the text between the markers of a name."""
    before, rest = text.split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->{after}"


def techniques_list(records: Records) -> str:
    """Write the README's list of techniques by perspective and kind; techniques proven here are bold."""
    rows = []
    for (perspective, kind_of), found in groupby(sorted(in_order(), key=place), key=place):
        links = []
        for name, kind in found:
            link = f"[{name}](docs/techniques/{source(kind).stem}.md)"
            links.append(f"**{link}**" if evidence.grade(name, records) == "proven here" else link)
        rows.append((perspective, kind_of, ", ".join(links)))
    return table(("perspective", "kind", "techniques"), rows)


def place(item: tuple[str, type[Technique]]) -> tuple[str, str]:
    """Return the perspective of a technique and the folder of its file."""
    return area(item[1]), source(item[1]).parent.name.replace("_", " ")


def headline(records: Records, overhead: Path, kept: Path) -> str:
    """Write the README's first numbers: the largest gains, how many there are, budgets kept, and overhead."""
    every = list(evidence.candidates(records))
    fair = [item for item in every if evidence.fair(item[1])]
    gained = sorted((item for item in fair if evidence.gained(*item[1:])), key=lambda item: -value(*item[1:]))
    best: dict[tuple[str, ...], tuple[str, Record, Arm]] = {}
    for item in gained:
        best.setdefault(tuple(evidence.techniques_of(item[2])), item)
    shown = list(best.values())[:BEST]
    rows = [
        (
            candidate_link(arm),
            evidence.over_defaults(arm),
            evidence.speed_up(document, arm),
            f"{TASKS.get(document['workload'], document['workload'])}, [{name}](docs/evidence/{name}.json)",
            str(len(document["seeds"])),
        )
        for name, document, arm in shown
    ]
    grades = Counter(evidence.grade(name, records) for name, _ in in_order())
    ratio = json.loads(overhead.read_text())["wall"]
    shares = [spent(run) for run in json.loads(kept.read_text())["runs"]]
    machines = "; ".join(dict.fromkeys(document["machine"] for _, document, _ in shown))
    facts = [
        f"Of {len(every)} candidates, {len(fair)} met the best that Trainer can do, with every option that it offers "
        f"for free, and {len(gained)} of these gained. [All results](#results) are below. Nothing has been measured on "
        "GPUs yet.",
        f"Of {grades.total()} techniques, {grades['proven here']} gained here, {grades['no gain shown']} showed no "
        f"gain, and {grades['reported']} rest on reports by others.",
        f"Runs spent between {min(shares):.1%} and {max(shares):.1%} of their budgets in time, tokens and FLOPs.",
        f"Without techniques, a step takes {ratio['ratio']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}] the time of "
        "a step of a plain Trainer.",
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    if not rows:
        return f"No speed-up is proven here yet.\n\n{listed}"
    header = ("technique or recipe", "over Trainer's defaults", "over the best of Trainer", "task", "seeds")
    opening = f"Speed-ups at equal loss [95 % interval], measured on small models on CPUs ({machines}):"
    return f"{opening}\n\n{table(header, rows)}\n\n{listed}"


def results_table(records: Records) -> str:
    """Write a table of results in the README: every candidate of every record, the fastest first."""
    found = list(evidence.candidates(records))
    if not found:
        return "No comparison is recorded yet."
    found.sort(key=lambda item: (-value(*item[1:]), item[1]["workload"], item[2]["name"]))
    rows = [
        (
            candidate_link(arm),
            f"[{name}](docs/evidence/{name}.json)",
            evidence.over_defaults(arm),
            evidence.speed_up(document, arm),
            f"{evidence.verdict(document, arm)}{tuning(document)}",
            str(len(document["seeds"])),
        )
        for name, document, arm in found
    ]
    machines = dict.fromkeys(document["machine"] for _, document, _ in found)
    costs = dict.fromkeys(evidence.cost_label(document["cost"]) for _, document, _ in found)
    header = ("technique or recipe", "workload", "over Trainer's defaults", "over the baseline", "verdict", "seeds")
    end = f"Speed-ups at equal quality with 95 % intervals, in {', '.join(costs)}. Machine: {'; '.join(machines)}."
    names = dict.fromkeys(name for name, document, _ in found if document.get("form", 1) < evidence.FORM)
    if older := [f"[{name}](docs/evidence/{name}.json)" for name in names]:
        end += f" Records of an older form, without trials and without all placebos: {', '.join(older)}."
    return f"{table(header, rows)}\n\n{end}"


def tuning(document: Record) -> str:
    """Say what the baseline lacks; nothing for the best that Trainer can do."""
    if evidence.fair(document):
        return ""
    return ", baseline tuned in part" if document["tuned"] else ", baseline not tuned"


def budgets_table(path: Path) -> str:
    """Write the README's table of budgeted runs against others of equal time, from ``benchmarks/budget.py``."""
    if not path.is_file():
        return "No comparison is recorded yet."
    rows = []
    for found in json.loads(path.read_text())["compared"]:
        fixed, cut_off = found["budgeted_against_fixed_at_equal_time"], found["budgeted_against_cut_off"]
        mean, seconds = found["mean"], found["mean_seconds"]
        seeds = {arm: len(runs) for arm, runs in found["runs"].items()}
        fewer = "" if seeds["cut off"] == seeds["budgeted"] else f" ({seeds['cut off']} seeds)"
        rows.append(
            (
                found["workload"],
                f"{found['budget_seconds']:g} s",
                str(seeds["budgeted"]),
                f"{mean['budgeted']:.4f} in {seconds['budgeted']:.1f} s",
                f"{mean['fixed']:.4f} in {seconds['fixed']:.1f} s",
                f"{mean['fixed at equal time']:.4f}",
                f"{fixed['difference']:+.4f} [{fixed['low']:+.4f}, {fixed['high']:+.4f}], margin {fixed['margin']:.4f}",
                fixed["verdict"],
                f"{mean['cut off']:.4f}{fewer}",
                "better" if cut_off["better"] else "not shown to be better",
            )
        )
    header = (
        *("workload", "budget", "seeds", "loss with `Budget`", "fixed steps, as measured"),
        *("fixed steps, moved to equal time", "difference at equal time [90 % interval]", "verdict"),
        *("cosine cut off by the clock", "`Budget` is"),
    )
    return table(header, rows)


def kept_table(path: Path) -> str:
    """Write the README's table of budgets and their use, as ``benchmarks/budget_kept.py`` recorded it."""
    events = {
        "": "-",
        "load": "one competing process per core in the second half",
        "kill": "killed halfway, resumed",
        "wide": "a model with 26 million parameters",
    }
    rows = []
    for run in json.loads(path.read_text())["runs"]:
        limit, _, event = run["case"].partition("+")
        evaluation = f"{run['last_evaluation_seconds']:.1f} s"
        rate = f"{run['final_learning_rate']:g}"
        rows.append((limit, events[event], f"{spent(run):.1%}", str(run["steps"]), evaluation, rate))
    return table(("budget", "event", "spent", "steps", "last evaluation", "final learning rate"), rows)


def spent(run: dict) -> float:
    """Return the share of its budget that a run of ``benchmarks/budget_kept.py`` spent."""
    unit, amount = parse_budget(run["case"].partition("+")[0])
    return run["seconds"] / amount if unit == "seconds" else run["shares"][f"{unit}_share"]


def constant_rate(document: Record) -> bool:
    """Return whether the baseline of a comparison never decays its learning rate."""
    return document.get("baseline_args", {}).get("lr_scheduler_type", "").startswith("constant")


def value(document: Record, arm: Arm) -> float:
    """Return the speed-up to sort by; 0 for a miss."""
    return arm["speed_ups"].get(document["cost"], {"value": 0.0})["value"]


def candidate_link(arm: Arm) -> str:
    """Link an arm to the card of its only technique, or to its recipe, and say what it changes."""
    kinds = dict(in_order())
    calls = [write_technique(*item) for entry in arm["techniques"] for item in entry.items()]
    names = evidence.techniques_of(arm)
    recipe = Path("configs", "recipes", f"{arm['name']}.yaml")
    if len(names) == 1:
        name = f"[{calls[0]}](docs/techniques/{source(kinds[names[0]]).stem}.md)" if names[0] in kinds else names[0]
    else:
        name = f"[{arm['name']}]({recipe})" if (ROOT / recipe).is_file() else arm["name"]
        name += f" ({', '.join(calls)})" if calls else ""
    changed = trained_with(arm.get("args", {})) if names else {}
    return name + (f" with {', '.join(f'{key} {value}' for key, value in changed.items())}" if changed else "")


if __name__ == "__main__":
    main()
