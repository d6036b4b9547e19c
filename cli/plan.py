"""forerun plan: the best layout for a model on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import document
from ..errors import InputError, NoFeasiblePlan
from ..plan import PlanFile
from .jobs import Job, read_job
from .log import say_job, say_not_executed
from .options import (
    POSITIVE,
    axis_options,
    common_options,
    fit_option,
    job_options,
    output_option,
    quality_options,
    space_option,
)
from .pins import search_pins

if TYPE_CHECKING:
    from ..planner import SearchResult


@click.command("plan")
@job_options
@axis_options
@click.option("--top", type=POSITIVE, default=5, show_default=True, help="Plans to show.")
@click.option("--pick", type=POSITIVE, default=1, help="Rank of the plan that -o writes.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop the search after this long and say what gap is left.",
)
@quality_options
@fit_option
@space_option
@output_option("the plan file")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    top: int,
    pick: int,
    time_limit: float | None,
    **flags: Any,
) -> None:
    """Search the best layout; an axis that is given is pinned, the rest is searched."""
    from ..planner import what_if
    from . import render

    job = read_job(flags)
    say_job(job)
    result = find_plans(job, flags, max(top, pick), time_limit)
    if result.infeasible is not None:
        if as_json:
            render.print_json(result.document())
        raise NoFeasiblePlan(result.infeasible.reason, result.infeasible.smallest_change)
    if pick > len(result.plans):
        raise InputError(
            "pick",
            pick,
            f"the search kept {len(result.plans)} plans",
            f"give 1 to {len(result.plans)}",
        )
    plan_files = ranked_files(result)
    say_not_executed(plan_files[pick - 1].plan)
    if output is not None:
        document.write(output, plan_files[pick - 1])
    more = what_if(result.plans[0], search_pins(job, flags), flags["fit"])
    if as_json:
        render.print_json({**result.document(), "what_if": more})
    else:
        render.print_job(job)
        render.print_plans(plan_files, [ranked.lost for ranked in result.plans])
        render.print_terms(plan_files[pick - 1].estimate)
        render.print_quality(plan_files[pick - 1].plan)
        render.print_search(result)
        render.print_what_if(more)


def find_plans(
    job: Job, flags: dict[str, Any], keep: int, time_limit_s: float | None
) -> SearchResult:
    """The best `keep` plans for a job, with what the search can say about them."""
    from ..planner import search

    return search(
        job.model,
        job.cluster,
        job.workload,
        search_pins(job, flags),
        fit=flags["fit"],
        keep=keep,
        time_limit_s=time_limit_s,
    )


def ranked_files(result: SearchResult) -> list[PlanFile]:
    """The plans of a search as plan files, best first."""
    return [PlanFile(label=r.label, plan=r.plan, estimate=r.estimate) for r in result.plans]
