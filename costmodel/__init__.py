"""(Model, Cluster, Workload, Plan) -> Estimate, and the comparison with a Measurement.

Pure functions of their arguments: no torch, no clock, no environment, no random source.
"""

from __future__ import annotations

from .bounds import Bounds, bound_layouts
from .calibrate import calibrate
from .diff import diff
from .estimates import estimate
from .layout import Layouts
from .memory_report import MemoryReport, memory_report

__all__ = [
    "Bounds",
    "Layouts",
    "MemoryReport",
    "bound_layouts",
    "calibrate",
    "diff",
    "estimate",
    "memory_report",
]
