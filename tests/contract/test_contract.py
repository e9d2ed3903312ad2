"""Every technique passes every check of the public contract; in each mode, some that answer to all hooks together."""

import pytest
from hook_classes import one_for_each_hook

from hf_accel.recipe import known_techniques
from hf_accel.testing import CHECKS, MODE_CHECKS, check_resumes_early_and_late

KINDS = known_techniques()
IN_MODE = {
    check: one_for_each_hook(KINDS, first=i * len(KINDS) // len(MODE_CHECKS)) for i, check in enumerate(MODE_CHECKS)
}
"""Techniques that continuous integration trains in a mode; the full suite trains all, the default one every third."""


def names_and_checks():
    for name in KINDS:
        for check in (*CHECKS, *MODE_CHECKS):
            left_out = [pytest.mark.ci] if check is check_resumes_early_and_late else []
            if check in IN_MODE:
                chosen = IN_MODE[check]
                default = name in chosen[MODE_CHECKS.index(check) % 3 :: 3]
                left_out = [] if default else [pytest.mark.ci] if name in chosen else [pytest.mark.full]
            yield pytest.param(name, check, marks=left_out, id=f"{name}-{check.__name__.removeprefix('check_')}")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of passes without gradients
@pytest.mark.parametrize(("name", "check"), [*names_and_checks()])
def test_contract(name, check, tmp_path, request):
    kind = KINDS[name]
    if reason := kind.expected_failed_checks.get(check.__name__):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    check(kind(**kind.probe_fields), tmp_path)
