"""Writes the cards and the tables of techniques from the code and from ``docs/evidence/*.json``.

    python docs/generate.py

``docs/techniques/<stem>.md`` is the card of ``hf_accel/**/<stem>.py``, and ``docs/techniques.md`` the index.  The
README's tables are renewed between their markers; the column "what it saves" is written by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from hf_accel import evidence
from hf_accel.cards import FIDELITY, NOTE, area, card, in_order, owned, source, table
from hf_accel.clock import parse_budget
from hf_accel.evidence import Arm, Record, Records
from hf_accel.technique import Technique

ROOT = Path(__file__).parents[1]
NOT_ON_FSDP2 = {
    "image": "accelerate asks the model for embeddings of tokens, which ConvNeXt lacks",
    "masked text": "FSDP2 takes no tied bias, as that of BERT's head is",
}
"""Modalities whose probes FSDP2 cannot train, with the reason."""


def main() -> None:
    """Write every document that `documents` gives, and remove cards of techniques that are gone."""
    written = documents()
    for path in (ROOT / "docs" / "techniques").glob("*.md"):
        if path not in written:
            path.unlink()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def documents() -> dict[Path, str]:
    """The text of each generated document."""
    records = evidence.load_records()
    docs = {card_path(kind): card(kind, records) for _, kind in in_order()}
    docs[ROOT / "docs" / "techniques.md"] = index(records)
    docs[ROOT / "docs" / "sharding.md"] = sharding()
    text = (ROOT / "README.md").read_text()
    text = renewed(text, "techniques", readme_table(text, records))
    text = renewed(text, "kept", kept_table(evidence.folder() / "budget-kept.json"))
    text = renewed(text, "budgets", budgets_table(evidence.folder() / "budget.json"))
    docs[ROOT / "README.md"] = renewed(text, "results", results_table(records))
    return docs


def card_path(kind: type[Technique]) -> Path:
    """Where the card of a technique is."""
    return ROOT / "docs" / "techniques" / f"{source(kind).stem}.md"


def index(records: Records) -> str:
    """The table of all techniques."""
    rows = [
        (
            f"[{name}](techniques/{source(kind).stem}.md)",
            area(kind),
            ", ".join(f"`{slot}`" for slot in owned(kind)) or "-",
            kind.fidelity,
            evidence.grade(name, records),
        )
        for name, kind in in_order()
    ]
    parts = [
        "# Techniques",
        NOTE,
        "At most one technique owns a slot; what has none composes freely. *Fidelity*: "
        + "; ".join(f"`{name}`, {words}" for name, words in FIDELITY.items())
        + ". *Evidence*: `reported` by others, until a record in [evidence](evidence) says `proven here` or "
        "`no gain shown`; each card has the figures.",
        table(("technique", "perspective", "slot", "fidelity", "evidence"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def sharding() -> str:
    """The table of techniques on several ranks, from what their classes declare."""
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
        "*Works*: two ranks end with the weights of one process (but for rounding), stay in step with each other, and "
        "a resumed run is the uninterrupted one bit for bit. *Refused*: in one sentence, before the first step. Each "
        "cell is a test (`tests/distributed/test_contract.py`, on CPUs with gloo; ZeRO with stages 2 and 3).",
        table(("technique", "DDP", "FSDP2", "ZeRO"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def renewed(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of a name replaced."""
    before, rest = text.split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->{after}"


def readme_table(text: str, records: Records) -> str:
    """The README's table of techniques; what each saves is taken from the old one."""
    saves = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]*\) \| \w+ \| ([^|]*) \|", text, re.MULTILINE))
    rows = []
    for name, kind in in_order():
        if name not in saves:
            raise ValueError(f"README: its table does not say what {name} saves. Add a row with 'what it saves'.")
        link = f"[`{name}`]({source(kind).relative_to(ROOT)})"
        rows.append((link, area(kind), saves[name], kind.fidelity, evidence.grade(name, records)))
    return table(("technique", "perspective", "what it saves", "fidelity", "evidence"), rows)


def results_table(records: Records) -> str:
    """The README's table of results: every candidate of every record, the fastest first."""
    found = list(evidence.candidates(records))
    if not found:
        return "No comparison is recorded yet."
    found.sort(key=lambda item: (-value(*item[1:]), item[1]["workload"], item[2]["name"]))
    rows = [
        (
            candidate_link(arm),
            f"[{name}](docs/evidence/{name}.json)",
            evidence.speed_up(document, arm),
            evidence.verdict(document, arm) + ("" if document["tuned"] else ", baseline not tuned"),
            str(len(document["seeds"])),
        )
        for name, document, arm in found
    ]
    machines = dict.fromkeys(document["machine"] for _, document, _ in found)
    costs = dict.fromkeys(evidence.said(document["cost"]) for _, document, _ in found)
    header = ("technique or recipe", "workload", "speed-up at equal quality (95 % interval)", "verdict", "seeds")
    return f"{table(header, rows)}\n\nSpeed-ups are in {', '.join(costs)}. Machine: {'; '.join(machines)}."


def budgets_table(path: Path) -> str:
    """The README's table of budgeted runs against others of the same time, recorded by ``benchmarks/budget.py``."""
    if not path.is_file():
        return "No comparison is recorded yet."
    rows = []
    for found in json.loads(path.read_text())["compared"]:
        fixed, cut_off = found["budgeted_against_fixed_at_equal_time"], found["budgeted_against_cut_off"]
        rows.append(
            (
                found["workload"],
                f"{found['budget_seconds']:g} s",
                str(len(found["runs"]["budgeted"])),
                f"{found['mean']['budgeted']:.4f}",
                f"{found['mean']['fixed at equal time']:.4f}",
                f"{fixed['difference']:+.4f} [{fixed['low']:+.4f}, {fixed['high']:+.4f}], margin {fixed['margin']:.4f}",
                fixed["verdict"],
                f"{found['mean']['cut off']:.4f}",
                "better" if cut_off["better"] else "not shown to be better",
            )
        )
    header = (
        *(
            "workload",
            "budget",
            "seeds",
            "loss of the budgeted run",
            "fixed steps",
            "difference [90 % interval]",
            "verdict",
        ),
        *("cosine cut off by the clock", "budgeted is"),
    )
    return table(header, rows)


def kept_table(path: Path) -> str:
    """The README's table of what was spent of budgets, as ``benchmarks/budget_kept.py`` recorded it."""
    events = {
        "": "-",
        "load": "from half-way on as many other processes as cores",
        "kill": "killed half-way, resumed",
        "wide": "a model of 26 million parameters",
    }
    rows = []
    for run in json.loads(path.read_text())["runs"]:
        limit, _, event = run["case"].partition("+")
        unit, amount = parse_budget(limit)
        share = run["seconds"] / amount if unit == "seconds" else run["shares"][f"{unit}_share"]
        evaluation = f"{run['last_evaluation_seconds']:.1f} s"
        rows.append(
            (limit, events[event], f"{share:.1%}", str(run["steps"]), evaluation, f"{run['final_learning_rate']:g}")
        )
    return table(("budget", "what was special", "spent", "steps", "last evaluation", "final learning rate"), rows)


def value(document: Record, arm: Arm) -> float:
    """The speed-up to sort by; 0 for a miss."""
    return arm["speed_ups"].get(document["cost"], {"value": 0.0})["value"]


def candidate_link(arm: Arm) -> str:
    """An arm's name, which leads to the card where it is of one technique of ours."""
    names, kinds = evidence.techniques_of(arm), dict(in_order())
    if len(names) == 1 and names[0] in kinds:
        return f"[{arm['name']}](docs/techniques/{source(kinds[names[0]]).stem}.md)"
    return f"{arm['name']} ({', '.join(names)})" if names else arm["name"]


if __name__ == "__main__":
    main()
