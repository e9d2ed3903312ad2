"""``hf-accel techniques``: list all techniques with their evidence, or print the card of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table


def techniques(
    name: Annotated[str | None, typer.Argument(help="Print the card of this technique.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the techniques with their evidence, or print the card of one."""
    from hf_accel import evidence
    from hf_accel.evidence import cards
    from hf_accel.recipe.technique_syntax import nearest

    records, known = evidence.load_records(), dict(cards.in_order())
    if name is not None:
        if name not in known:
            raise ValueError(f"technique({name!r}): there is no such technique. {nearest(name, known)}")
        text = cards.card(known[name], records)
        if as_json:
            print(json.dumps({**cards.facts(known[name], records), "card": text}))
        else:
            Console().print(Markdown(text))
        return
    rows = [cards.facts(kind, records) for kind in known.values()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title="Techniques", title_justify="left")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(", ".join(cell) if isinstance(cell, list) else cell for cell in row.values()))
    Console().print(table)
    Console().print("hf-accel techniques NAME prints a card.", highlight=False)
