"""Describe a run with techniques in the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def extend_model_card(path: Path, trainer: Any) -> None:
    """Name the techniques, the budget and the receipt in a model card."""
    lines = ["", "### Training with hf_accel", ""]
    lines += [f"- `{technique!r}`" for technique in trainer.techniques] or ["- no technique"]
    if trainer.receipt is not None:
        receipt = trainer.receipt
        budget = ", ".join(f"{amount:g} {unit}" for unit, amount in receipt.budget.items())
        lines += [
            "",
            f"Budget: {budget}. Spent: {receipt.wall_seconds:.1f} s, {receipt.steps} steps, {receipt.samples:.0f} "
            "samples. See `receipt.json` and `recipe.yaml`.",
        ]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
