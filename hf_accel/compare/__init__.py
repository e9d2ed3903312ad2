"""Comparing: how many times faster a recipe reaches the quality of a fair baseline.

    results = compare("InfoBatch(keep=0.5)", workload="digits", seeds=5)

The same on the command line: ``hf-accel compare "InfoBatch(keep=0.5)" --workload digits``.
"""

from hf_accel.compare.comparison import Arm, Comparison, Progress, Run, compare
from hf_accel.compare.record import write_record
from hf_accel.compare.results import Results, Row
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
