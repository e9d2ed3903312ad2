"""Every technique passes every check of the public contract."""

import pytest

from hf_accel.recipe import known_techniques
from hf_accel.testing import CHECKS, MODE_CHECKS


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of passes without gradients
@pytest.mark.parametrize("check", (*CHECKS, *MODE_CHECKS), ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", known_techniques())
def test_contract(name, check, tmp_path, request):
    kind = known_techniques()[name]
    if reason := kind.expected_failed_checks.get(check.__name__):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    check(kind(**kind.probe_fields), tmp_path)
