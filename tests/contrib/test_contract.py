"""The contract of the techniques of `hf_accel.contrib`: three checks by default, and all of them in the full suite."""

import pytest

from hf_accel import contrib
from hf_accel.testing import CHECKS, check_neutral_is_trainer, check_resumes_bit_exactly, check_trains

TECHNIQUES = [getattr(contrib, name) for name in contrib.__all__]
ALWAYS = [check_trains, check_neutral_is_trainer, check_resumes_bit_exactly]


@pytest.mark.parametrize("kind", TECHNIQUES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[] if check in ALWAYS else pytest.mark.full) for check in CHECKS],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_contract(kind, check, tmp_path):
    check(kind(**kind.probe_fields), tmp_path)
