"""The whole contract of one technique."""

from __future__ import annotations

from pathlib import Path

from hf_accel.technique import Technique
from hf_accel.testing.checks import CHECKS
from hf_accel.testing.modes import MODE_CHECKS

__all__ = ["check_technique"]


def check_technique(technique: Technique, directory: str | Path) -> None:
    """Run all checks; those in ``expected_failed_checks`` must fail."""
    for check in (*CHECKS, *MODE_CHECKS):
        place = Path(directory, check.__name__)
        place.mkdir(parents=True, exist_ok=True)
        if (reason := technique.expected_failed_checks.get(check.__name__)) is None:
            try:
                check(technique, place)
            except AssertionError as error:
                raise AssertionError(f"{check.__name__}: {error}") from error
            continue
        try:
            check(technique, place)
        except Exception:
            continue
        raise AssertionError(f"{technique!r} passes {check.__name__}, which it declares to fail ({reason})")
