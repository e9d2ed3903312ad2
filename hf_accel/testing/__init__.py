"""The contract that every technique passes, for ours and for yours: ``check_technique(MyTechnique())``.

Each check is a function of a technique and a directory, and raises ``AssertionError`` where the contract is broken.  A
technique that is known to break one says so in ``expected_failed_checks``, with the reason.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(MyTechnique(), tmp_path)

``CHECKS`` train in float32; ``MODE_CHECKS`` repeat the essential ones in bfloat16, with activation checkpointing and
with a tied head.
"""

from hf_accel.testing import checks, covering, probes
from hf_accel.testing.checks import *
from hf_accel.testing.covering import *
from hf_accel.testing.probes import *

__all__ = []
__all__ += checks.__all__
__all__ += covering.__all__
__all__ += probes.__all__
