"""Plan files: read from a path, made of a plan."""

from __future__ import annotations

from pathlib import Path

from .. import document
from ..plan import Plan, PlanFile


def read_plan_file(path: Path) -> PlanFile:
    """The plan file at `path`, checked against itself."""
    plan_file = document.read(PlanFile, path)
    plan_file.plan.check()
    return plan_file


def plan_file_of(plan: Plan) -> PlanFile:
    """The plan priced by the cost model, as the file that `run` and `diff` read."""
    from ..costmodel import estimate

    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))
