"""Every technique passes every check of the public contract; in each mode, some that answer to all hooks together."""

import pytest
from hook_classes import one_for_each_hook, one_of_each_class

from hf_accel.recipe import known_techniques
from hf_accel.testing import CHECKS, MODE_CHECKS, check_resumes_early_and_late

KINDS = known_techniques()
IN_MODE = {
    check: one_for_each_hook(KINDS, first=i * len(KINDS) // len(MODE_CHECKS)) for i, check in enumerate(MODE_CHECKS)
}
"""Techniques of which every third trains in a mode; the full suite trains all."""

RESUMED_OFTEN = one_of_each_class()
"""Techniques that continuous integration resumes at more points than one; the full suite resumes all."""


def names_and_checks():
    for name in KINDS:
        for check in (*CHECKS, *MODE_CHECKS):
            left_out = []
            if check is check_resumes_early_and_late:
                left_out = [pytest.mark.ci if name in RESUMED_OFTEN else pytest.mark.full]
            elif check in IN_MODE and name not in IN_MODE[check][MODE_CHECKS.index(check) % 3 :: 3]:
                left_out = [pytest.mark.full]
            yield pytest.param(name, check, marks=left_out, id=f"{name}-{check.__name__.removeprefix('check_')}")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of passes without gradients
@pytest.mark.parametrize(("name", "check"), [*names_and_checks()])
def test_contract(name, check, tmp_path, request):
    kind = KINDS[name]
    if reason := kind.expected_failed_checks.get(check.__name__):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    check(kind(**kind.probe_fields), tmp_path)
