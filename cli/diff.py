"""forerun diff: predicted against measured, term by term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import document
from ..cluster import Profile
from ..errors import ToleranceExceeded
from ..measurement import Measurement
from ..plan import Plan
from .options import common_options, plan_argument
from .plan_files import read_plan_file


@click.command("diff")
@plan_argument
@click.argument("measured_path", metavar="MEASURED", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a report to this file.")
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    metavar="FRACTION",
    help="Exit 4 when step time or memory is off by more, such as 0.1.",
)
@click.option("--repredict", is_flag=True, help="Price the plan again with today's profile.")
@common_options
def command(
    as_json: bool,
    plan_path: Path,
    measured_path: Path,
    html: Path | None,
    max_error: float | None,
    repredict: bool,
) -> None:
    """Compare PLAN's prediction with MEASURED; error = predicted / measured - 1."""
    from ..costmodel.diff import diff
    from ..planner import risks
    from . import render
    from .report import report_html

    plan_file = read_plan_file(plan_path)
    measurement = document.read(Measurement, measured_path)
    profile = today_profile(plan_file.plan) if repredict else None
    comparison = diff(plan_file, measurement, repredict=repredict, profile=profile)
    comparison["quality"] = [document.to_raw(risk) for risk in risks(plan_file.plan)]
    if html is not None:
        document.write_bytes(html, report_html(comparison).encode())
    if as_json:
        render.print_json(comparison)
    else:
        render.print_diff(comparison)
    if max_error is not None:
        check_tolerance(comparison, max_error)


def today_profile(plan: Plan) -> Profile | None:
    """The profile that the user's folder holds for the plan's device."""
    from ..catalogs import load_user_profile

    return load_user_profile(plan.cluster.pools[0].device.name)


def check_tolerance(comparison: dict[str, Any], max_error: float) -> None:
    """Raise ToleranceExceeded when step time or live memory is further off than `max_error`."""
    for name in ("step", "memory"):
        error = comparison[name]["error"]
        if error is not None and abs(error) > max_error:
            raise ToleranceExceeded(
                f"max-error={max_error:g}: {name} is off by {error:+.3f}; "
                "calibrate the profile, or allow more"
            )
