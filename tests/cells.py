"""Tables of what ran, in docs/: each cell is a success, or the number of a refusal that is given below the table."""

import re


def written(heading, names, columns, found, success):
    """The document of the cells ``{(name, column): success or the words of a refusal}``; ``columns`` maps to titles."""
    refusals = list(dict.fromkeys(words for words in found.values() if words != success))
    lines = [heading, "| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = (found.get((name, column), "not run") for column in columns)
        cells = (f"({refusals.index(cell) + 1})" if cell in refusals else cell for cell in cells)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {words}" for number, words in enumerate(refusals, 1))]
    return "\n".join(lines) + "\n"


def read(text):
    """The cells that `written` was given."""
    refusals = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line[:1] == "|"
    )
    columns = [cell.strip("`") for cell in header[1:]]
    return {
        (name, column): refusals[cell[1:-1]] if cell.startswith("(") else cell
        for name, *cells in rows
        for column, cell in zip(columns, cells, strict=True)
        if cell != "not run"
    }
