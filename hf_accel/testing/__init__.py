"""Check the contract that every technique passes, ours and yours: ``check_technique(MyTechnique(), directory)``.

Each check takes a technique and a directory, and raises ``AssertionError`` if the technique breaks the contract.  A
technique declares checks that it fails in ``expected_failed_checks``, with reasons.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(MyTechnique(), tmp_path)

``CHECKS`` train in float32; ``MODE_CHECKS`` repeat the essential ones in bfloat16, with activation checkpointing and
with a tied head.
"""

from hf_accel.testing import checks, contract, modes, probes
from hf_accel.testing.checks import *
from hf_accel.testing.contract import *
from hf_accel.testing.modes import *
from hf_accel.testing.probes import *

__all__ = []
__all__ += checks.__all__
__all__ += contract.__all__
__all__ += modes.__all__
__all__ += probes.__all__
