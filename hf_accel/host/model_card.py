"""Describe a run with techniques in the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_accel.receipt import Receipt
from hf_accel.technique import Technique


def extend_model_card(path: Path, techniques: Sequence[Technique], receipt: Receipt | None) -> None:
    """Name the techniques, the limits and the receipt in a model card."""
    lines = ["", "### Training with hf_accel", ""]
    lines += [f"- `{technique!r}`" for technique in techniques] or ["- no technique"]
    if receipt is not None:
        limits = ", ".join(f"{amount:g} {unit}" for unit, amount in receipt.budget.items())
        lines += [
            "",
            f"Limit: {limits}. Spent: {receipt.wall_seconds:.1f} s, {receipt.steps} steps, {receipt.samples:.0f} "
            "samples. See `receipt.json` and `recipe.yaml`.",
        ]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
