"""The evidence: records of comparisons, and the cards of techniques."""

from hf_accel.evidence.records import (
    Arm,
    Record,
    Records,
    candidates,
    cost_label,
    findings,
    folder,
    gained,
    grade,
    holm,
    load_records,
    sentence,
    speed_up,
    techniques_of,
    verdict,
)

__all__ = [
    "Arm",
    "Record",
    "Records",
    "candidates",
    "cost_label",
    "findings",
    "folder",
    "gained",
    "grade",
    "holm",
    "load_records",
    "sentence",
    "speed_up",
    "techniques_of",
    "verdict",
]
