"""forerun: plan a training run, execute the plan, see how far the prediction was from the truth.

The public Python API is the vocabulary (six nouns, all plain immutable data) and the functions that
lead from one to the next; the functions load on first use, so that `import forerun` stays fast.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .cluster import Cluster, Device, Link, Pool, Profile
from .errors import ForerunError, InputError, NoFeasiblePlan, RunFailed, ToleranceExceeded
from .estimate import Estimate, Interval
from .experts import Experts
from .measurement import Measurement
from .mesh import Mesh
from .model import Layer, Model
from .plan import Phase, Plan, PlanFile, Setting, Stage
from .stack import Stack
from .workload import Workload

if find_spec("forerun.planner") is None:
    raise ImportError(
        "this checkout has no symbolic links: git config core.symlinks true, or install a wheel"
    )

__version__ = "0.1.0"

_LAZY = {
    "load_model": "forerun.catalogs",
    "load_cluster": "forerun.catalogs",
    "estimate": "forerun.costmodel",
    "diff": "forerun.costmodel",
    "calibrate": "forerun.costmodel",
    "search": "forerun.planner",
    "run": "forerun.executors",
}

if TYPE_CHECKING:
    from .catalogs import load_cluster, load_model
    from .costmodel import calibrate, diff, estimate
    from .executors import run
    from .planner import search


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'forerun' has no attribute '{name}'")


__all__ = [
    "Cluster", "Device", "Estimate", "Experts", "ForerunError", "InputError", "Interval", "Layer",
    "Link", "Measurement", "Mesh", "Model", "NoFeasiblePlan", "Phase", "Plan", "PlanFile", "Pool",
    "Profile", "RunFailed", "Setting", "Stack", "Stage", "ToleranceExceeded", "Workload",
    "calibrate", "diff", "estimate", "load_cluster", "load_model", "run", "search",
]  # fmt: skip
