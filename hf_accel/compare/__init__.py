"""Comparisons: how many times faster a recipe reaches the quality of a fair baseline.

    results = compare("InfoBatch(keep=0.5)", workload="digits", seeds=5)

On the command line: ``hf-accel compare "InfoBatch(keep=0.5)" --workload digits``.
"""

try:
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"hf_accel.compare needs {error.name}. Install it with: pip install 'hf-accel[compare]'."
    ) from error

from hf_accel.compare.arms import Arm
from hf_accel.compare.comparison import Comparison, compare
from hf_accel.compare.execution import Progress
from hf_accel.compare.plan import Run
from hf_accel.compare.results import Results, Row, write_record
from hf_accel.compare.statistics import NonInferiority, SpeedUp, non_inferiority, speed_up
from hf_accel.compare.workloads import WORKLOADS, Workload, build_workload

__all__ = [
    "WORKLOADS",
    "Arm",
    "Comparison",
    "NonInferiority",
    "Progress",
    "Results",
    "Row",
    "Run",
    "SpeedUp",
    "Workload",
    "build_workload",
    "compare",
    "non_inferiority",
    "speed_up",
    "write_record",
]
