"""(Model, Cluster, Workload, Plan) -> Estimate, and the comparison with a Measurement.

Pure functions of their arguments: no torch, no clock, no environment, no random source.
"""

from __future__ import annotations

from .bounds import Bounds, bound_layouts
from .calibrate import calibrate
from .diff import diff
from .layout import Layouts
from .simulate import estimate

__all__ = [
    "Bounds",
    "Layouts",
    "bound_layouts",
    "calibrate",
    "diff",
    "estimate",
]
